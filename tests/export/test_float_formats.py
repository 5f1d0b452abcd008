"""Floating-point formats, and words of 2 and 3 bits, as the format's own reader has them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedModel,
)

from smoothq import Recipe, export, preset, quantize
from smoothq.export.schemes import Scheme, schemes_of
from smoothq.modules import QuantizedLinear
from tests.tiny_models import wide_llama

pytest.importorskip("compressed_tensors")

FP8 = preset("fp8")
RECIPES: dict[str, Recipe] = {
    "fp8": FP8,
    "fp8, tensors": FP8.edit(
        weights__granularity="tensor", activations__granularity="tensor", activations__static=True
    ),
    "fp8, weights alone": FP8.edit(activations={"bits": 16, "type": "int"}),
    **{
        name: preset(name)
        for name in (
            *("fp8-block", "w4a8-fp8", "mxfp8", "mxfp4", "nvfp4", "w4a16-nvfp4"),
            *("w3a16", "w2a16"),
        )
    },
}
LAYOUTS = {
    "fp8": "float-quantized",
    "fp8, tensors": "float-quantized",
    "fp8, weights alone": "float-quantized",
    "fp8-block": "float-quantized",
    "w4a8-fp8": "pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "w4a16-nvfp4": "nvfp4-pack-quantized",
    "w3a16": "pack-quantized",
    "w2a16": "pack-quantized",
}
# Weights that the reader has in bfloat16, whatever it is asked for.
IN_BFLOAT16 = ("mxfp8", "mxfp4", "nvfp4", "w4a16-nvfp4")
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
Made = tuple[PreTrainedModel, Path]
each_form = pytest.mark.parametrize("form", RECIPES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Our model of a format, and the directory of its export, made once."""
    model = wide_llama()
    data = torch.randint(0, 96, (4, 64))
    place = tmp_path_factory.mktemp("exports")
    known: dict[str, Made] = {}

    def of(form: str) -> Made:
        if form not in known:
            out = place / form
            recipe = RECIPES[form].edit(tuning=None)
            ours = quantize(model, recipe, data=data, output=out / "own", servable=True).load()
            export(out / "own", out / "export")
            known[form] = ours, out / "export"
        return known[form]

    return of


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


@each_form
def test_the_layout_is_the_formats(made, form) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    _, directory = made(form)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert QuantizationConfig.model_validate(config).format == config["format"] == LAYOUTS[form]


@each_form
def test_weights_are_read_as_ours(made, form) -> None:
    ours, directory = made(form)
    whole = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=whole
    )
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            wanted = module.quantized_weight().dequantize()
            read = theirs.get_submodule(name).get_parameter("weight")
            torch.testing.assert_close(read.float(), wanted, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("form", [form for form in RECIPES if form not in IN_BFLOAT16])
def test_logits_are_ours(made, form) -> None:
    ours, directory = made(form)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert relative(logits(ours), logits(theirs)) < 2e-3


@each_form
def test_a_linear_rounds_and_multiplies_as_the_readers(made, form) -> None:
    """On equal inputs, up to how the reader rounds them: in bfloat16 before it does to codes, and
    an MX scale up where the maximum is in the last quarter before the next power of two."""
    of_inputs = dict.fromkeys(RECIPES, 0.03) | {"mxfp4": 0.15, "nvfp4": 0.05}
    ours, directory = made(form)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linears = [name for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)]
    for name in linears:
        theirs.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    logits(theirs)
    for name in linears:
        x, y = seen[name]
        with torch.no_grad():
            assert relative(ours.get_submodule(name)(x.float()), y.float()) < of_inputs[form], name


@each_form
def test_a_scheme_is_read_back(made, form) -> None:
    _, directory = made(form)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    (scheme,) = set(schemes_of(config, ["a"]).values())
    assert isinstance(scheme, Scheme)
    assert scheme.arguments() == {
        key: config["config_groups"]["group_0"][key]
        for key in ("weights", "input_activations", "format")
    }
