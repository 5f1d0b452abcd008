"""The migration strength: for all edges, for each, searched; a quantile beside the maximum."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smoothq import preset, quantize
from smoothq.discovery import equivalence as equivalence
from smoothq.errors import RecipeError
from smoothq.pipeline.alpha_search import CANDIDATES
from tests.architectures import tiny_model
from tests.conftest import RECIPES

TOKENS = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(1))
EDGES = ("norms", "up_down", "value_output")


def divisors(recipe, float_checkpoint, data, out) -> dict[str, torch.Tensor]:
    """What each norm of the first block was divided by."""
    quantize(float_checkpoint("llama"), recipe, data=data, output=out)
    smoothed = AutoModelForCausalLM.from_pretrained(out).model.layers[0]
    stock = tiny_model("llama", torch.float32).model.layers[0]
    names = ("input_layernorm", "post_attention_layernorm")
    return {n: stock.get_submodule(n).weight / smoothed.get_submodule(n).weight for n in names}


def test_an_alpha_for_each_edge_is_that_of_the_edge(float_checkpoint, data, tmp_path) -> None:
    one = preset("w8a8").edit(smoothing__alpha=0.8, smoothing__edges=["norms"])
    each = one.edit(smoothing__alpha={"norms": 0.8, "up_down": 0.2}, smoothing__edges=EDGES[:2])
    first = divisors(one, float_checkpoint, data, tmp_path / "one")
    second = divisors(each, float_checkpoint, data, tmp_path / "each")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = divisors(one.edit(smoothing__alpha=0.2), float_checkpoint, data, tmp_path / "other")
    assert not torch.equal(first["input_layernorm"], other["input_layernorm"])


def test_an_edge_without_an_alpha_is_refused() -> None:
    with pytest.raises(RecipeError, match="alpha has no value for the edge up_down"):
        preset("w8a8").edit(smoothing__alpha={"norms": 0.5})


def test_a_quantile_divides_by_less_than_the_maximum(float_checkpoint, data, tmp_path) -> None:
    recipe = preset("w8a8").edit(smoothing__alpha=1.0, smoothing__edges=["norms"])
    maximum = divisors(recipe, float_checkpoint, data, tmp_path / "maximum")
    high = recipe.edit(smoothing__quantile=0.9)
    quantile = divisors(high, float_checkpoint, data, tmp_path / "quantile")
    for name in maximum:
        assert (quantile[name] < maximum[name]).all()


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", "w4a4", "w4a8"])
def test_auto_takes_a_candidate_and_leaves_everything_else(
    recipe, float_checkpoint, data, tmp_path
) -> None:
    auto = RECIPES[recipe].edit(smoothing__alpha="auto", smoothing__edges=EDGES)
    out = tmp_path / "out"
    model = quantize(float_checkpoint("llama"), auto, data=data, output=out).load()
    exact = equivalence.logits(tiny_model("llama", torch.float32), TOKENS)
    fixed = quantize(float_checkpoint("llama"), RECIPES[recipe], data=data)
    errors = [(equivalence.logits(m, TOKENS) - exact).norm() for m in (model, fixed)]
    assert errors[0] < 1.5 * errors[1]
    stored = json.loads((out / "config.json").read_text())
    assert stored["quantization_config"]["recipe"]["smoothing"]["alpha"] == "auto"


def test_auto_finds_what_outliers_in_the_input_ask_for(data, caplog) -> None:
    def chosen(factor: float) -> set[float]:
        model = tiny_model("llama", torch.float32)
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= factor
            for part in "qkv":
                layer.self_attn.get_submodule(f"{part}_proj").weight[:, :2] /= factor
        recipe = preset("w8a8").edit(smoothing__alpha="auto", smoothing__edges=["norms"])
        caplog.clear()
        with caplog.at_level("DEBUG", "smoothq"):
            quantize(model, recipe, data=data)
        found = [r.args for r in caplog.records if r.msg.startswith("%s, %s: alpha")]
        return {alpha for _, site, alpha in found if site == "qkv"}

    plain, outliers = chosen(1.0), chosen(1000.0)
    assert plain | outliers <= set(CANDIDATES)
    assert min(outliers) >= 0.5
