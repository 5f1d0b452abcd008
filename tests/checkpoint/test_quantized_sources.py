"""A model that is quantized already is quantized like its twin of decoded weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoothq import preset, quantize
from smoothq.checkpoint import source as source_module
from smoothq.checkpoint.loading import load_as_stored
from smoothq.checkpoint.open import open_source
from smoothq.errors import CheckpointError, SmoothqError, UnsupportedModelError
from tests.checkpoint.quantized_sources import (
    WEIGHTS,
    add_to_config,
    fp8_deepseek,
    mxfp4_gpt_oss,
)
from tests.tiny_models import VOCABULARY

MODELS = {"fp8": fp8_deepseek, "mxfp4": mxfp4_gpt_oss}
RECIPES = {
    "w8a8": preset("w8a8", method="rtn"),
    "w4a16": preset("w4a16").edit(
        weights__rounding="rtn", weights__group_size=16, rotation=None, tuning=None
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A quantized model's folder, and its bfloat16 twin's."""
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "expert by expert"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_codes_and_scales_are_those_of_the_twin(
    pair, recipe, streams, data, tmp_path, monkeypatch
) -> None:
    if streams:
        monkeypatch.setattr(source_module, "STACK_BYTES", 1)
    tensors = []
    for folder in pair:
        out = tmp_path / folder.name
        result = quantize(folder, RECIPES[recipe], data=data, output=out)
        tensors.append(load_file(out / WEIGHTS))
        noted = [note for note in result.notes if "decoded to bfloat16 while it is read" in note]
        assert bool(noted) == (folder == pair[0])
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "smoothq"
    one, other = tensors
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_source_is_the_twins(pair) -> None:
    encoded, twin = map(open_source, pair)
    assert encoded.specs == twin.specs
    assert encoded.extras == twin.extras == {}
    assert encoded.skeleton().config.to_dict().keys() == twin.skeleton().config.to_dict().keys()


def test_another_scale_is_another_model(pair, tmp_path) -> None:
    known = open_source(pair[0]).fingerprint()
    assert open_source(pair[0]).fingerprint() == known
    tensors = load_file(pair[0] / WEIGHTS)
    name = next(name for name in tensors if name.endswith(("scale_inv", "_scales")))
    tensors[name].view(-1)[0] += 1
    for path in pair[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert open_source(tmp_path).fingerprint() != known


@torch.no_grad()
def test_loaded_whole_it_is_the_float_model_of_its_decoded_weights(pair) -> None:
    tokens = torch.arange(12)[None] % VOCABULARY
    encoded, twin = (
        load_as_stored(folder, str(folder), torch.float32)(tokens).logits for folder in pair
    )
    assert torch.equal(encoded, twin)


def test_plan_says_what_is_read(pair, run) -> None:
    code, printed, _ = run("plan", pair[0], "--w8a8", "--json")
    assert code == 0
    notes = json.loads(printed)["notes"]
    assert any(note.endswith("decoded to bfloat16 while it is read") for note in notes)


def test_its_claims_are_the_twins(pair, run) -> None:
    encoded, twin = (json.loads(run("models", folder, "--json")[1]) for folder in pair)
    assert encoded | {"model": ""} == twin | {"model": ""}


def test_an_export_is_a_source(float_checkpoint, data, run, tmp_path) -> None:
    original, export = open_source(float_checkpoint("llama")), tmp_path / "export"
    quantize(
        *(original.directory, RECIPES["w8a8"]),
        data=data,
        output=export,
        format="compressed-tensors",
        check=False,
    )
    source = open_source(export)
    assert source.specs == original.specs
    weights = dict(original.tensors(original.specs))
    for name, decoded in source.tensors(source.specs):
        assert (decoded - weights[name]).norm() <= 0.01 * weights[name].norm()
    code, printed, _ = run("plan", export, "--w4a8", "--group-size", 16, "--json")
    assert code == 0
    assert any("compressed-tensors' integers" in note for note in json.loads(printed)["notes"])


def test_what_the_class_does_not_know_is_kept_decoded(tmp_path) -> None:
    folder, _ = fp8_deepseek(tmp_path)
    stored = load_file(folder / WEIGHTS)
    known, beyond = "model.layers.2.self_attn.q_a_proj.", "model.layers.3.self_attn.q_a_proj."
    extras = {name: tensor for name, tensor in stored.items() if name.startswith(known)}
    assert len(extras) == 3  # codes, their scale, and the inputs'
    stored |= {name.replace(known, beyond): part.clone() for name, part in extras.items()}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    source = open_source(folder)
    assert source.extras == {f"{beyond}weight": source.specs[f"{known}weight"]}
    weights = dict(source.tensors([f"{known}weight", f"{beyond}weight"]))
    assert torch.equal(weights[f"{known}weight"], weights[f"{beyond}weight"])


def test_modelopts_own_file_says_what_is_quantized(float_checkpoint, tmp_path) -> None:
    for path in float_checkpoint("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for algorithm, match in (("NVFP4", "ModelOpt's NVFP4, but no tensor"), ("W4A8", "to W4A8")):
        described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(described))
        with pytest.raises(SmoothqError, match=match):
            open_source(tmp_path).skeleton()


def _with_config(folder: Path, target: Path, quantization: dict[str, object]) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    add_to_config(target, quantization)
    return target


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"'bitsandbytes'.*dequantize\(\)"),
        ({"quant_method": "aqlm"}, "'aqlm'.*quantize the float model"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"quant_method": "gptq", "bits": 3}, "in 3 bits; read are 2, 4, 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "ModelOpt to W4A8_AWQ"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "transform_config": {"config_groups": {"u": {"type": "hadamard"}}},
            },
            "transforms that run beside the weights",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size = \[0, 128\]"),
    ],
)
def test_what_is_not_decoded_is_refused_by_name(
    quantization, match, float_checkpoint, tmp_path
) -> None:
    folder = _with_config(float_checkpoint("llama"), tmp_path, quantization)
    with pytest.raises(UnsupportedModelError, match=match):
        open_source(folder)


class TestDamage:
    def test_a_scale_that_is_missing_is_named(self, pair, tmp_path) -> None:
        folder = self.without(pair[0], tmp_path, ("q_a_proj.weight_scale_inv", "up_proj_scales"))
        with pytest.raises(CheckpointError, match=r"without the scale|no tensor"):
            open_source(folder).skeleton()

    def test_scales_that_do_not_fit_are_named(self, pair, tmp_path) -> None:
        tensors = load_file(pair[0] / WEIGHTS)
        name = next(name for name in tensors if name.endswith(("scale_inv", "_scales")))
        tensors[name] = torch.ones((7, 7), dtype=tensors[name].dtype)
        for path in pair[0].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"has shape \(7, 7\)"):
            open_source(tmp_path).skeleton()

    @staticmethod
    def without(folder: Path, target: Path, ends: tuple[str, ...]) -> Path:
        """A copy of a model without the tensors whose names end so."""
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / WEIGHTS)
        left = {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}
        assert len(left) < len(tensors)
        save_file(left, target / WEIGHTS, {"format": "pt"})
        return target
