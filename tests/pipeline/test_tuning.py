"""Block-wise tuning: what it gains, what it keeps, what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothq import Recipe, preset, quantize
from smoothq.errors import RecipeError
from smoothq.pipeline.block_tuning import relative_error
from tests.conftest import RECIPES

FORMS = {
    "a scale a channel": RECIPES["w4a4-smoothrot"],
    "full range": RECIPES["w4a4-smoothrot"].edit(
        weights__full_range=True, activations__full_range=True
    ),
    "multipliers": RECIPES["w4a4"].edit(tuning=None),
    "a scale a group": RECIPES["w4a16-float-groups"],
    "zero points": RECIPES["w4a16-asymmetric"].edit(tuning=None),
    "round to nearest": RECIPES["w4a8"].edit(weights__rounding="rtn", smoothing=None, tuning=None),
    "live": RECIPES["w4a4-rrs-live"],
}
each_form = pytest.mark.parametrize("form", FORMS)


def tuned(recipe: Recipe, **settings: float) -> Recipe:
    """The recipe with tuning."""
    return recipe.edit(tuning=settings)


@torch.no_grad()
def divergence(float_model: Path, recipe: Recipe, data: Tensor) -> float:
    """KL of the quantized model's predictions on the calibration text itself, from the float's."""
    reference = AutoModelForCausalLM.from_pretrained(float_model)
    model = quantize(float_model, recipe, data=data, check=False)
    wanted, found = (m(input_ids=data).logits.log_softmax(-1) for m in (reference, model))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@each_form
def test_it_brings_the_model_closer_to_the_float_one(float_checkpoint, data, form) -> None:
    model, recipe = float_checkpoint("llama"), FORMS[form]
    before = divergence(model, recipe, data)
    assert divergence(model, tuned(recipe, steps=20), data) < 0.5 * before


@each_form
def test_without_a_step_that_moves_a_code_it_changes_nothing(
    float_checkpoint, data, tmp_path, form
) -> None:
    recipe = FORMS[form]
    still = tuned(recipe, steps=1, code_rate=1e-9, scale_rate=0)
    for out, made in (("plain", recipe), ("still", still)):
        quantize(float_checkpoint("llama"), made, data=data, output=tmp_path / out, check=False)
    plain, after = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "still"))
    assert plain.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in plain.items())


def test_it_moves_codes_and_scales_and_nothing_else(float_checkpoint, data, tmp_path) -> None:
    for out, made in (
        ("plain", FORMS["multipliers"]),
        ("tuned", tuned(FORMS["multipliers"], steps=8)),
    ):
        quantize(float_checkpoint("llama"), made, data=data, output=tmp_path / out, check=False)
    plain, after = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "tuned"))
    assert {name: (t.shape, t.dtype) for name, t in plain.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    moved = {name for name, tensor in plain.items() if not torch.equal(tensor, after[name])}
    first = {name for name in plain if ".layers.0." in name and "_proj.weight" in name}
    assert {name for name in moved if ".layers.0." in name} == {
        name for name in first if not name.endswith("multiplier")
    }
    assert not any("embed" in name or "norm" in name for name in moved)


def test_the_same_recipe_gives_the_same_bytes(float_checkpoint, data, tmp_path) -> None:
    recipe = tuned(FORMS["multipliers"], steps=3)
    for out in ("first", "second"):
        quantize(float_checkpoint("llama"), recipe, data=data, output=tmp_path / out, check=False)
    first, second = (tmp_path / out / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_every_token_weighs_alike_in_the_error() -> None:
    wanted = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    output = torch.tensor([[3.0, 5.0], [300.0, 500.0]])
    assert relative_error(output, wanted).item() == pytest.approx(1 / 25)
    assert relative_error(wanted, wanted).item() == 0


def test_one_scale_a_tensor_is_refused() -> None:
    with pytest.raises(RecipeError, match="weights per channel or group"):
        preset("w8a8").edit(weights__granularity="tensor", tuning={})
