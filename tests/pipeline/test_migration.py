"""The migration strength: for all edges, for each, searched; a quantile beside the maximum."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smoothq import preset, quantize
from smoothq.discovery import equivalence as equivalence
from smoothq.errors import RecipeError
from smoothq.pipeline.alpha_search import CANDIDATES
from tests.conftest import RECIPES
from tests.tiny_models import tiny_model

TOKENS = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(1))
EDGES = ("norms", "up_down", "value_output")


def divisors(recipe, float_checkpoint, data, out) -> dict[str, torch.Tensor]:
    """What each norm of the first block was divided by."""
    quantize(float_checkpoint("llama"), recipe, data=data, output=out, check=False)
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
    fixed = quantize(float_checkpoint("llama"), RECIPES[recipe], data=data, check=False)
    errors = [(equivalence.logits(m, TOKENS) - exact).norm() for m in (model, fixed)]
    assert errors[0] < 1.5 * errors[1]
    stored = json.loads((out / "config.json").read_text())
    assert stored["quantization_config"]["recipe"]["smoothing"]["alpha"] == "auto"


SITES = {"qkv": ("self_attn", ("q_proj", "k_proj", "v_proj"))}
SITES["gate_up"] = ("mlp", ("gate_proj", "up_proj"))


def simulated_errors(model, data, site: str) -> dict[float, float]:
    """Candidate → the error of the first block's output with one site in 8 bits, as SmoothQuant's.

    Written again from the paper: s = max|x|^α / max|w|^(1−α), then both are rounded to nearest.
    """
    module, names = SITES[site]
    block, seen = model.model.layers[0], {}
    readers = [block.get_submodule(f"{module}.{name}") for name in names]
    floats = [reader.weight.clone() for reader in readers]

    def output(prepare) -> torch.Tensor:
        hooks = [reader.register_forward_pre_hook(prepare) for reader in readers]
        hooks.append(block.register_forward_hook(lambda _, args, result: seen.update(y=result)))
        model(data)
        for hook in hooks:
            hook.remove()
        return seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]

    def rounded(values: torch.Tensor) -> torch.Tensor:
        step = values.abs().amax(-1, keepdim=True) / 127
        return (values / step).round() * step

    wanted = output(lambda _, args: seen.update(x=args[0]))
    x, w = seen["x"].flatten(0, -2).abs().amax(0), torch.cat(floats).abs().amax(0)
    errors = {}
    for alpha in CANDIDATES:
        divisor = x**alpha / w ** (1 - alpha)
        for reader, weight in zip(readers, floats, strict=True):
            reader.weight.copy_(rounded(weight * divisor))
        output_now = output(lambda _, args, divisor=divisor: (rounded(args[0] / divisor),))
        share = (output_now - wanted).square().sum(-1) / wanted.square().sum(-1)
        errors[alpha] = share.mean().item()
    for reader, weight in zip(readers, floats, strict=True):
        reader.weight.copy_(weight)
    return errors


@pytest.mark.parametrize("factor", [1, 30])
@torch.no_grad()
def test_auto_takes_the_candidate_of_the_least_error(data, caplog, factor) -> None:
    model = tiny_model("llama", torch.float32)
    layer = model.model.layers[0]
    layer.input_layernorm.weight[:2] *= factor
    layer.post_attention_layernorm.weight[3:5] *= factor
    recipe = preset("w8a8").edit(smoothing__alpha="auto", smoothing__edges=["norms"])
    with caplog.at_level("DEBUG", "smoothq"):
        quantize(model, recipe, data=data, check=False)
    chosen = [r.args for r in caplog.records if r.msg.startswith("%s, %s: alpha")]
    for site in SITES:
        errors = simulated_errors(model, data, site)
        alpha = next(alpha for _, name, alpha in chosen if name == site)
        assert errors[alpha] == pytest.approx(min(errors.values()), rel=0.005), errors
        assert factor == 1 or max(errors.values()) > 1.2 * min(errors.values())


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
            quantize(model, recipe, data=data, check=False)
        found = [r.args for r in caplog.records if r.msg.startswith("%s, %s: alpha")]
        return {alpha for _, site, alpha in found if site == "qkv"}

    plain, outliers = chosen(1.0), chosen(1000.0)
    assert plain | outliers <= set(CANDIDATES)
    assert min(outliers) >= 0.5
