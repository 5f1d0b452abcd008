"""Linears of vision and audio towers, where a recipe quantizes them too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from smoothq import QuantizeResult, Recipe, preset, quantize
from smoothq.checkpoint.open import open_source
from smoothq.errors import OutputError, RecipeError
from smoothq.export import export_checkpoint
from smoothq.modules import QuantizedLinear
from smoothq.pipeline import ends
from smoothq.plan.portability import make_exportable
from smoothq.plan.resolve import make_plan
from smoothq.verify import verify_checkpoint
from tests.conftest import RECIPES
from tests.tiny_classes import answer, tiny_class
from tests.tiny_images import VISION, batch_for, picture, processor_of
from tests.tiny_models import tiny_model

TOWERS = [*VISION, "qwen2_audio"]
RTN = preset("w8a8", "rtn").edit(vision=8)
TEXT = torch.randint(2, 90, (4, 16), generator=torch.Generator().manual_seed(5))


def linears_of_towers(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
        and "language_model" not in name
        and name != "lm_head"
    }


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], QuantizeResult]:
    """A model quantized with its towers, in a directory; made once."""
    done: dict[str, QuantizeResult] = {}

    def of(name: str) -> QuantizeResult:
        if name not in done:
            out = tmp_path_factory.mktemp("towers") / "out"
            done[name] = quantize(tiny_class(name), RTN, output=out)
        return done[name]

    return of


@pytest.mark.parametrize("name", TOWERS)
def test_every_linear_of_a_tower_is_quantized_loaded_and_verified(name, made) -> None:
    model, loaded = tiny_class(name), made(name).load()
    assert linears_of_towers(model) <= quantized(loaded)
    reference, found = answer(model, name), answer(loaded, name)
    assert (found - reference).norm() < 0.06 * reference.norm()
    verify_checkpoint(made(name).path)
    stored = load_file(made(name).path / "model.safetensors")
    assert all(stored[f"{n}.weight"].dtype == torch.int8 for n in linears_of_towers(model))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_codes_are_those_of_plain_rounding(name, made) -> None:
    """Each row to nearest, on the grid of its maximum; the input token by token."""
    model, loaded = tiny_class(name), made(name).load()
    for module in linears_of_towers(model):
        weight: Any = model.get_submodule(module).weight
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        linear: Any = loaded.get_submodule(module)
        assert torch.equal(linear.quantized_weight().codes, (weight / scale).round().char())
        assert linear.site_input.spec.mode == "token"


@pytest.mark.parametrize("name", ["llava", "qwen2_audio"])
def test_it_is_saved_and_loaded_again_and_dequantized(name, made, tmp_path) -> None:
    loaded = made(name).load()
    found = answer(loaded, name)
    loaded.save_pretrained(tmp_path)
    auto: Any = type(loaded)
    assert torch.equal(answer(auto.from_pretrained(tmp_path, dtype=torch.float32), name), found)
    back = made(name).load().dequantize()
    assert not quantized(back)
    assert (answer(back, name) - found).norm() < 0.06 * found.norm()


def test_weights_alone_are_quantized_where_the_recipe_leaves_inputs_in_float() -> None:
    model = tiny_class("llava")
    recipe = RECIPES["w4a16"].edit(vision=8, smoothing=None, tuning=None, rotation=None)
    found = quantize(model, recipe, data=TEXT)
    reference = answer(found, "llava")
    tower: Any = found.get_submodule("model.multi_modal_projector.linear_1")
    assert tower.site_input.spec.mode == "float"
    assert tower.spec.grid.bits == 8
    torch.testing.assert_close(answer(found.dequantize(), "llava"), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vision", [8, 16])
def test_keep_and_overrides_reach_towers(vision) -> None:
    model = tiny_class("llava")
    recipe = preset("w8a8", "rtn").edit(
        vision=vision,
        keep=["model.vision_tower.*.out_proj"],
        overrides=[{"match": "*.encoder.layers.1.mlp.*", "weights": {"bits": 4}}],
    )
    found = quantize(model, recipe, data=TEXT)
    four = {f"model.vision_tower.encoder.layers.1.mlp.fc{n}" for n in (1, 2)}
    towers = linears_of_towers(model)
    kept = {name for name in towers if name.endswith("out_proj")}
    assert quantized(found) & towers == (towers - kept if vision == 8 else four)
    for name in four:
        linear: Any = found.get_submodule(name)
        assert linear.spec.grid.bits == 4


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RTN.edit(overrides=[{"match": "model.sight.*"}]), "matches no linear"),
        (
            preset("w8a8").edit(overrides=[{"match": "model.vision_tower.*"}]),
            "outside of the text model alone",
        ),
        (
            RTN.edit(
                overrides=[
                    {
                        "match": "model.vision_tower.*",
                        "activations": {"static": True, "granularity": "tensor"},
                    }
                ]
            ),
            "is a linear of a tower",
        ),
    ],
)
def test_what_a_tower_cannot_have_is_refused(recipe: Recipe, message) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(open_source(tiny_class("llava")).skeleton(), recipe)


def test_a_plan_lists_and_counts_the_linears_of_towers() -> None:
    skeleton = open_source(tiny_class("llava")).skeleton()
    text, whole = (make_plan(skeleton, RTN.edit(vision=bits)) for bits in (16, 8))
    assert not text.towers
    assert set(whole.towers) == linears_of_towers(skeleton)
    elements = sum(linear.weight.elements for linear in whole.towers.values())
    assert whole.linear_bytes - text.linear_bytes == sum(
        linear.weight.elements + 4 * linear.weight.out_features for linear in whole.towers.values()
    )
    assert text.float_elements - whole.float_elements == elements
    assert whole.total_bytes < text.total_bytes
    assert 8 < whole.bits.weight < text.bits.weight + 1
    partly = make_plan(skeleton, RTN.edit(keep=["model.vision_tower.*"]))
    assert partly.bits.weight > whole.bits.weight
    assert any("14 of 14 linears of the towers" in note for note in whole.notes)


def test_the_output_has_the_bytes_that_were_planned(made) -> None:
    result = made("llava")
    stored = load_file(result.path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == result.bytes_after


@pytest.mark.parametrize("name", VISION)
def test_the_check_of_the_output_looks_through_the_towers(name, monkeypatch) -> None:
    """With an image among the calibration data: other codes in one linear are found."""
    data = [batch_for(name, picture(1))]
    wanted = RECIPES["w8a8"].edit(vision=8)
    quantize(tiny_class(name), wanted, processor_of(name), data=data)
    stored = ends.tower_tensors

    def damaged(*arguments: Any) -> dict[str, Tensor]:
        tensors = stored(*arguments)
        return {
            key: -value if value.dtype == torch.int8 else value for key, value in tensors.items()
        }

    for module in ("storing", "round_trip"):  # both, so that bytes agree and results do not
        monkeypatch.setattr(f"smoothq.pipeline.{module}.tower_tensors", damaged)
    with pytest.raises(OutputError, match="first in block 0"):
        quantize(tiny_class(name), wanted, processor_of(name), data=data)


def test_an_export_that_holds_no_towers_refuses_them_by_name(made, tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"linears of vision or audio towers .* vision: 16"):
        export_checkpoint(made("llava").path, tmp_path / "export")
    skeleton = open_source(tiny_class("llava")).skeleton()
    recipe, changes = make_exportable(skeleton, RTN)
    assert recipe.vision == 16
    assert "vision: 16" in changes


def test_a_text_model_alone_is_loaded_without_its_towers(tmp_path, float_checkpoint) -> None:
    quantize(float_checkpoint("gemma3"), RTN, output=tmp_path / "out")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert any("vision" in name for name in quantized(whole))
    text: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(text(input_ids=TEXT).logits, whole(input_ids=TEXT).logits)


def test_a_model_of_text_has_no_towers(tmp_path: Path) -> None:
    plan = make_plan(open_source(tiny_model("llama", torch.float32)).skeleton(), RTN)
    assert not plan.towers


def test_the_flag_quantizes_towers(tmp_path, run) -> None:
    tiny_class("llava").save_pretrained(tmp_path / "float")
    line = ("quantize", tmp_path / "float", "--w8a8", "--method", "rtn", "--vision")
    code, _, said = run(*line, "-o", tmp_path / "out")
    assert not code, said
    assert Recipe.from_pretrained(tmp_path / "out").vision == 8
