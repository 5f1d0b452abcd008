"""What must hold of the families that were released last, those with images with one in the prompt.

Llama stands beside them: bounds that it does not keep would say nothing.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoothq import Recipe, preset, quantize
from smoothq.architectures import _BY_MODEL_TYPE, BlockGraph, Family, Norm, family_of
from smoothq.architectures.graph import takes_rotation, text_config
from smoothq.architectures.linearize import restore_block
from smoothq.discovery import equivalence
from smoothq.discovery.claims import without_read
from smoothq.discovery.infer import discover_family
from smoothq.discovery.weight_watch import read_weights
from smoothq.plan.resolve import make_plan
from tests.released_models import (
    IMAGES,
    LENGTH,
    PLACEHOLDERS,
    PLACES,
    RELEASED,
    prompt,
    released_model,
    text_tokens,
)

W8A8 = preset("w8a8", "rtn")
QUAROT = preset("w4a4", "quarot").edit(weights__rounding="rtn")
OUTLIERS, FACTOR = [7, 44, 83, 110], 16.0  # channels of the residual stream
NEW_TOKENS = 6

pytestmark = pytest.mark.slow


@cache
def family(name: str) -> Family:
    model = released_model(name)
    return family_of(text_config(model)) or discover_family(model.config)[0]


def opened(model: PreTrainedModel, name: str) -> list[tuple[nn.Module, BlockGraph]]:
    equivalence.open_blocks(model, family(name))
    return list(equivalence.graphs(model, family(name)))


@pytest.fixture(autouse=True)
def discovered_once(name: str, monkeypatch) -> None:
    """Every plan of a model takes the family that was discovered first."""
    config = text_config(float_model(name))
    monkeypatch.setitem(_BY_MODEL_TYPE, config.model_type, family(name))


@cache
def float_model(name: str) -> PreTrainedModel:
    return released_model(name)


@cache
def quantized(name: str) -> PreTrainedModel:
    return quantize(float_model(name), W8A8, check=False)


def logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def errors(measured: Tensor, exact: Tensor) -> Tensor:
    """The relative error of each token's logits."""
    return ((measured - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten()


def to_nearest(x: Tensor, bits: int) -> Tensor:
    """The rows of a tensor on a grid with one scale each."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    return (x / scale).round().clamp(-top - 1, top) * scale


def rounded_plainly(model: PreTrainedModel, recipe: Recipe, name: str) -> PreTrainedModel:
    """A copy whose linears of a plan have weights and inputs on plain grids."""
    plan = make_plan(model, recipe)
    plain = copy.deepcopy(model)
    equivalence.open_blocks(plain, family(name))
    bits = recipe.activations.bits
    for linear, weight, _ in plan.linears():
        module = plain.get_submodule(linear)
        module.weight.data = to_nearest(module.weight.data, weight.grid.bits)
        module.register_forward_pre_hook(lambda _, args: (to_nearest(args[0], bits), *args[1:]))
    return plain


@cache
def with_outliers(name: str) -> PreTrainedModel:
    """The float model, with few channels that all writers of the residual stream make large."""
    model = copy.deepcopy(float_model(name))
    model.get_input_embeddings().weight.data[:, OUTLIERS] *= FACTOR
    stock = float_model(name).get_submodule(family(name).parts(model).layers)
    for index, (block, graph) in enumerate(opened(model, name)):
        for writer in graph.residual_writers:
            writer.view(block)[OUTLIERS] *= FACTOR
            bias = writer.bias_view(block)
            if bias is not None:
                bias[OUTLIERS] *= FACTOR
        for norm, parameter in block.named_parameters():
            if not graph.residual_writers and norm.startswith(("post_", "layer_post")):
                parameter[OUTLIERS] *= FACTOR
        restore_block(block, stock[index])
    return model


@pytest.mark.parametrize("name", RELEASED)
class TestClaims:
    def test_norms_take_divisors_and_the_stream_a_rotation(self, name: str) -> None:
        graphs = [graph for _, graph in opened(released_model(name), name)]
        for graph in graphs:
            assert any(isinstance(s.producer, Norm) and s.reads == "residual" for s in graph.sites)
        # Behind what writes the stream Gemma 4 has norms, into which no rotation can be folded:
        # its sites are rotated online, each by itself.
        assert takes_rotation(graphs) == (name != "gemma4")

    def test_each_leaves_the_logits(self, name: str) -> None:
        model, inputs = released_model(name, torch.float64), prompt(name, torch.float64)
        with equivalence.InFloat64():
            before = logits(model, inputs)
            # Linears whose weights the model's code reads stay in float.
            claimed = without_read(family(name), read_weights(model, text_tokens()))
            equivalence.open_blocks(model, claimed)
            rewrites = equivalence.claims(model, claimed)
            for claim, rewrite in {**rewrites, "together": equivalence.everything}.items():
                rewritten = copy.deepcopy(model)
                rewrite(rewritten, claimed)
                change = equivalence.deviation(logits(rewritten, inputs), before)
                assert change < equivalence.TOLERANCE[torch.float64], claim


@pytest.mark.parametrize("name", ["llama", *RELEASED])
class TestErrors:
    def test_of_eight_bits_are_those_of_plain_rounding_in_text_and_images(self, name: str) -> None:
        exact = logits(float_model(name), prompt(name))
        plain = rounded_plainly(float_model(name), W8A8, name)
        expected = errors(logits(plain, prompt(name)), exact)
        measured = errors(logits(quantized(name), prompt(name)), exact)
        image = torch.zeros(len(exact[0]), dtype=torch.bool)
        image[PLACES] = name in IMAGES
        for places in (image, ~image):
            if places.any():
                assert measured[places].median() <= 1.3 * expected[places].median() + 0.005
        assert measured.mean() <= 3 * expected.mean() + 0.005

    def test_of_four_bits_with_outliers_are_less_with_a_rotation(self, name: str) -> None:
        model, text = with_outliers(name), {"input_ids": text_tokens()}
        exact = logits(model, text)
        plain = errors(logits(rounded_plainly(model, QUAROT, name), text), exact).median()
        rotated = errors(logits(quantize(model, QUAROT, check=False), text), exact).median()
        assert rotated <= 0.75 * plain


def text_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """What generates: of Llama 4 the text model, for the class around it asks it for more."""
    return model.language_model if name == "llama4" else model


def read_by_it(name: str) -> dict[str, Any]:
    """The prompt of `text_model`."""
    inputs = prompt(name)
    return {"input_ids": inputs["input_ids"]} if name == "llama4" else inputs


def decoded(model: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
    """Tokens that a model generates, and its logits for each, by its cache."""
    with torch.no_grad():
        output = text_model(model, name).generate(
            **read_by_it(name),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            suppress_tokens=PLACEHOLDERS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return output.sequences[:, LENGTH:], torch.stack(output.logits, 1)


def prefilled(model: PreTrainedModel, name: str, tokens: Tensor) -> Tensor:
    """The logits of generated tokens, of the prompt and them at once."""
    inputs = read_by_it(name)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tokens)], 1)
    return logits(text_model(model, name), inputs)[:, LENGTH - 1 : -1]


@pytest.mark.parametrize("name", RELEASED)
def test_decoding_agrees_with_prefill_as_the_stock_model_does(name: str) -> None:
    def difference(model: PreTrainedModel) -> float:
        tokens, by_cache = decoded(model, name)
        at_once = prefilled(model, name, tokens)
        greatest = errors(by_cache, at_once).max()
        chosen = at_once.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        at_once[..., PLACEHOLDERS] = -torch.inf
        assert (chosen >= at_once.amax(-1) - 1e-2).all()  # the tokens that prefill would choose
        return float(greatest)

    # A quantizer is a step function: the last bits of a float may change a code.
    assert difference(quantized(name)) <= 10 * difference(float_model(name)) + 2e-3
