"""Quantized experts run together: one product for all of a layer, and equal results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothq import kernels, quantize
from smoothq.architectures.experts import SeparateExperts
from smoothq.modules import QuantizedLinear
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

TOKENS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
OF_CODES = ["w8a8", "w8a8-rtn", "w8a8-static", "w4a8", "w4a4", "w4a4-rs", "w4a4-rrs-calibrated"]
OF_FLOATS = ["w4a16", "w4a16-float-groups", "w8a16"]
ONE_BY_ONE = ["w8a8-tensor", "w4a16-asymmetric"]
ALL_RECIPES = RECIPES | {
    "w8a16": RECIPES["w8a8-rtn"].edit(activations__bits=16, weights__group_scale="float")
}


@cache
def quantized(name: str, recipe: str) -> PreTrainedModel:
    changed = ALL_RECIPES[recipe].edit(tuning=None, gptq__least_tokens=1)
    model: PreTrainedModel = quantize(
        tiny_model(name, torch.float32), changed, data=TOKENS, check=False
    )
    model.set_experts_implementation("smoothq")
    return model.eval()


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The number of experts in each product of several."""
    calls: list[int] = []

    def counting(operator: Callable[..., Tensor], *operands: Any) -> Tensor:
        calls.append(next(len(operand) for operand in operands if isinstance(operand, list)))
        return operator(*operands)

    for name in ("expert_gemm", "expert_weight_only_gemm"):
        monkeypatch.setattr(kernels, name, partial(counting, getattr(kernels, name)))
    return calls


def one_by_one(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    model.set_experts_implementation("eager")
    logits: Tensor = model(tokens).logits
    model.set_experts_implementation("smoothq")
    return logits


def assert_same(name: str, together: Tensor, alone: Tensor) -> None:
    """Equal to the bit, but for gpt-oss: PyTorch's sigmoid of every second column of one row rounds
    otherwise than of several rows.
    """
    if name == "gpt_oss":
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(together, alone)


def layers_with_experts(model: nn.Module) -> list[SeparateExperts]:
    return [module for module in model.modules() if isinstance(module, SeparateExperts)]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1]], ids=["prompt", "one token"])
@pytest.mark.parametrize("recipe", [*OF_CODES, *OF_FLOATS, *ONE_BY_ONE])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_the_result_is_that_of_one_expert_after_the_other(name, recipe, tokens, counted) -> None:
    model = quantized(name, recipe)
    counted.clear()
    together = model(tokens).logits
    products = len(counted)
    assert_same(name, together, one_by_one(model, tokens))
    assert len(counted) == products
    layers = layers_with_experts(model)
    assert products == (0 if recipe in ONE_BY_ONE else 2 * len(layers))


@pytest.mark.parametrize("recipe", [*OF_CODES, *OF_FLOATS, *ONE_BY_ONE])
def test_the_report_says_which_operator_multiplies_them(recipe) -> None:
    model = quantized("mixtral", recipe)
    lines = [line.split() for line in kernels.report(model).splitlines()]
    products = [run for kind, _, run, *_ in lines if kind == "model.layers.*.mlp.experts"]
    operator = "expert_gemm" if recipe in OF_CODES else "expert_weight_only_gemm"
    assert products == ([] if recipe in ONE_BY_ONE else [operator])


def test_the_report_of_experts_that_run_one_by_one_has_no_line_for_them() -> None:
    model = copy.deepcopy(quantized("mixtral", "w8a8"))
    model.set_experts_implementation("eager")
    assert "expert_gemm" not in kernels.report(model)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w4a8", "w4a16"])
def test_only_the_experts_of_a_token_are_multiplied(recipe, counted) -> None:
    model = quantized("mixtral", recipe)
    counted.clear()
    model(TOKENS[:1, :1])
    assert set(counted) == {2}


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_an_expert_that_is_watched_runs_by_itself(recipe, counted) -> None:
    model = copy.deepcopy(quantized("mixtral", recipe))
    expected = model(TOKENS).logits
    watched = layers_with_experts(model)[0].first[0][1]
    seen: list[int] = []
    watched.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    counted.clear()
    assert torch.equal(model(TOKENS).logits, expected)
    assert len(seen) == 1
    assert len(counted) == 2 * (len(layers_with_experts(model)) - 1)


@torch.no_grad()
def test_codes_that_are_replaced_count_from_the_next_forward_on() -> None:
    """As where accelerate brings the tensors of an offloaded module."""
    model = copy.deepcopy(quantized("mixtral", "w8a8"))
    before = model(TOKENS).logits
    for module in layers_with_experts(model)[0].modules():
        if isinstance(module, QuantizedLinear):
            module.hold(-module.codes)
    negated = model(TOKENS).logits
    assert not torch.equal(negated, before)
    for module in layers_with_experts(model)[0].modules():
        if isinstance(module, QuantizedLinear):
            module.hold(-module.codes)
    assert torch.equal(model(TOKENS).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_in_16_bits(recipe) -> None:
    model = copy.deepcopy(quantized("qwen2_moe", recipe)).bfloat16()
    assert torch.equal(model(TOKENS).logits, one_by_one(model, TOKENS))


def test_no_token_at_all() -> None:
    (layer, *_) = layers_with_experts(quantized("mixtral", "w8a8"))
    hidden = torch.zeros(0, layer.first[0][0].in_features)
    none = torch.zeros(0, 2)
    assert layer(hidden, none.long(), none).shape == hidden.shape


@torch.no_grad()
def test_float_experts_take_the_name_too() -> None:
    model = tiny_model("mixtral", torch.float32)
    expected = model(TOKENS).logits
    model.set_experts_implementation("smoothq")
    assert torch.equal(model(TOKENS).logits, expected)


@torch.no_grad()
def test_a_checkpoint_runs_them_together_when_it_is_loaded(tmp_path, counted) -> None:
    model = quantized("mixtral", "w8a8")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    counted.clear()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert len(counted) == 2 * 2 * len(layers_with_experts(model))
