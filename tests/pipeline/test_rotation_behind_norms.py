"""A residual rotation `online`: behind each norm, which then can be smoothed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smoothq import preset, quantize
from smoothq.plan.portability import make_exportable
from smoothq.plan.resolve import make_plan
from smoothq.recipe.recipe import Recipe
from tests.tiny_models import wide_llama

TOKENS = torch.randint(0, 96, (4, 64), generator=torch.Generator().manual_seed(5))
BEHIND = {"residual": "online", "block_size": 32}


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    """A model whose norms bring out two channels, as large models' do."""
    model = wide_llama()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[[5, 70]] = 20.0
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def error(source: LlamaForCausalLM, recipe: Recipe, place: Path) -> float:
    quantize(source, recipe, data=TOKENS, output=place, overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    wanted = logits(source)
    return float((logits(model) - wanted).norm() / wanted.norm())


def test_it_turns_inputs_and_not_the_stream(source) -> None:
    plan = make_plan(source, preset("mxfp4").edit(rotation=BEHIND))
    assert plan.residual_rotation is None
    turned = {site.site.stage for site in plan.sites if site.input.rotation is not None}
    read = {site.site.stage for site in plan.sites if site.site.reads == "residual"}
    assert read <= turned


def test_it_keeps_the_function(source, tmp_path) -> None:
    plain = preset("w8a8").edit(activations__bits=16)
    turned = plain.edit(rotation=BEHIND)
    assert error(source, turned, tmp_path) < 1.2 * error(source, plain, tmp_path) + 1e-3


def test_smoothed_norms_before_it_spare_four_bits_the_outliers(source, tmp_path) -> None:
    recipe = preset("mxfp4").edit(tuning=None, weights__rounding="rtn")
    behind = recipe.edit(rotation=BEHIND, smoothing__edges=("norms", "up_down"))
    offline = recipe.edit(rotation={"block_size": 32}, smoothing__edges=("up_down",))
    assert error(source, behind, tmp_path) < 0.9 * error(source, offline, tmp_path)


def test_what_readers_cannot_run_is_rotated_offline_for_them(source) -> None:
    recipe, changed = make_exportable(source, preset("mxfp4").edit(rotation=BEHIND))
    assert recipe.rotates.residual is True
    assert "rotation.residual: true" in changed


@pytest.mark.parametrize(("head_dim", "blocks"), [(16, 16), (80, 16), (24, 8)])
def test_a_head_that_blocks_do_not_divide_is_rotated_in_what_does(head_dim, blocks) -> None:
    model = wide_llama(head_dim=head_dim, num_key_value_heads=4)
    plan = make_plan(model, preset("mxfp4"))
    rotation = plan.blocks[0].value_rotation
    assert rotation is not None
    assert rotation.left * rotation.right == blocks
    assert any(f"do not divide {head_dim} channels" in note for note in plan.notes)


def test_a_model_of_such_heads_is_quantized(tmp_path) -> None:
    model = wide_llama(head_dim=16, num_attention_heads=8)
    recipe = preset("mxfp4").edit(tuning=None)
    plain = recipe.edit(rotation=None, smoothing=None, weights__rounding="rtn")
    assert error(model, recipe, tmp_path) < 1.1 * error(model, plain, tmp_path)
