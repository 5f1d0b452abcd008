"""Stored tensors quantized without a model's class: what is rounded, what stays, what stops."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothq import export, preset, quantize
from smoothq.errors import NumericsError, RecipeError, SmoothqError, UnsupportedModelError
from smoothq.export import model_free, stored_model
from smoothq.plan.sites import weight_grid
from smoothq.rounding.float_grid import BLOCK
from smoothq.rounding.rtn import round_to_nearest
from tests.tiny_models import wide_llama

HIDDEN, INNER, ROWS = 256, 384, 300  # rows: two chunks and a part of BLOCK rows
BLOCK0 = "model.layers.0"
LINEARS = {
    f"{BLOCK0}.self_attn.q_proj": (ROWS, HIDDEN),
    f"{BLOCK0}.self_attn.k_proj": (64, HIDDEN),
    f"{BLOCK0}.self_attn.v_proj": (64, HIDDEN),
    f"{BLOCK0}.self_attn.o_proj": (HIDDEN, ROWS - 44),
    f"{BLOCK0}.mlp.experts.0.w1": (INNER, HIDDEN),
    f"{BLOCK0}.mlp.experts.0.w3": (INNER, HIDDEN),
    f"{BLOCK0}.mlp.experts.0.w2": (HIDDEN, INNER),
}
FLOATS = {
    "model.embed_tokens.weight": (500, HIDDEN),
    "lm_head.weight": (500, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    f"{BLOCK0}.mlp.gate.weight": (40, HIDDEN),
    f"{BLOCK0}.mlp.gate.bias": (40,),
    f"{BLOCK0}.self_attn.q_proj.bias": (ROWS,),
    f"{BLOCK0}.self_attn.g.weight": (4, HIDDEN),
    f"{BLOCK0}.short_conv.weight": (HIDDEN, 64),
    "vision_tower.blocks.0.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.1.mlp.experts.down_proj": (2, HIDDEN, HIDDEN),
    "model.scale": (),
    "model.empty": (0, 4),
}
CONFIG = {"model_type": "invented", "architectures": ["InventedForCausalLM"], "hidden_size": HIDDEN}
FORMS = ["fp8", "fp8-block", "mxfp8", "mxfp4", "w4a16-nvfp4", "w4a8-fp8", "w4a8", "w4a16", "w2a16"]
FORMS += ["w8a8"]


def invented(directory: Path, shards: int = 3, **config: Any) -> dict[str, Tensor]:
    """Store a model of a type that nobody knows; returns its tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {**{f"{name}.weight": shape for name, shape in LINEARS.items()}, **FLOATS}
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    directory.mkdir()
    files = {f"model-{i}.safetensors": list(tensors)[i::shards] for i in range(shards)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "modeling_invented.py").write_text("raise SystemExit('was run')")
    return tensors


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path) -> Path:
    invented(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("form", FORMS)
def test_each_linear_is_rounded_to_nearest_and_all_else_stays(tmp_path, monkeypatch, form) -> None:
    """Chunks of rows change nothing: here there are three of the first linear."""
    monkeypatch.setattr(model_free, "CHUNK_WEIGHTS", 1)
    tensors, out = invented(tmp_path / "model"), tmp_path / "out"
    result = quantize(tmp_path / "model", form, output=out, model_free=True)
    source = stored_model.StoredModel.open(str(tmp_path / "model"))
    linears = model_free._planned(source, result.recipe, "").linears
    stored = all_tensors(out)
    shared = [[f"{BLOCK0}.self_attn.{name}_proj" for name in "qkv"]]
    shared += [[f"{BLOCK0}.mlp.experts.0.{name}" for name in ("w1", "w3")]]
    for name, shape in LINEARS.items():
        weight = tensors[f"{name}.weight"]
        together = next((names for names in shared if name in names), [name])
        largest = max(float(tensors[f"{other}.weight"].abs().max()) for other in together)
        grid = weight_grid(result.recipe, shape[1], name)
        rounded = round_to_nearest(weight, grid, largest)
        wanted = linears[name].scheme.tensors(rounded, grid, torch.bfloat16, None)
        for key, tensor in wanted.items():
            torch.testing.assert_close(
                stored.pop(f"{name}.{key}").float(), tensor.float(), rtol=0, atol=0
            )
    assert set(stored) == set(FLOATS)
    for name, tensor in stored.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_no_tensor_is_in_memory_whole(model, tmp_path, monkeypatch) -> None:
    chunks: list[tuple[int, ...]] = []
    rounds, reads = model_free.round_to_nearest, stored_model.read_rows

    def rounding(weight, *arguments):
        chunks.append(weight.shape)
        return rounds(weight, *arguments)

    def reading(path, tensor, count):
        for rows in reads(path, tensor, count):
            chunks.append(rows.shape)
            yield rows

    monkeypatch.setattr(model_free, "round_to_nearest", rounding)
    monkeypatch.setattr(stored_model, "read_rows", reading)
    monkeypatch.setattr(model_free, "CHUNK_WEIGHTS", BLOCK * HIDDEN)
    monkeypatch.setattr(stored_model, "COPIED_BYTES", 2 * 64 * BLOCK)
    quantize(model, "fp8", output=tmp_path / "out", model_free=True)
    assert max(shape[0] for shape in chunks if len(shape) == 2) == BLOCK
    assert max(shape[0] for shape in chunks if len(shape) == 3) == 1


def test_the_config_is_the_models_with_schemes_that_the_format_validates(model, tmp_path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    quantize(model, "fp8", output=tmp_path / "out", model_free=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    schemes = config.pop("quantization_config")
    assert config == CONFIG
    assert QuantizationConfig.model_validate(schemes).format == "float-quantized"
    assert not set(schemes["ignore"]) & set(LINEARS)
    assert {
        *("lm_head", f"{BLOCK0}.mlp.gate", f"{BLOCK0}.self_attn.g", f"{BLOCK0}.short_conv"),
        *("vision_tower.blocks.0.q_proj", "model.layers.1.mlp.experts"),
    } <= set(schemes["ignore"])


def test_files_go_along_and_no_code_is_run(model, tmp_path) -> None:
    quantize(model, "fp8", output=tmp_path / "out", model_free=True)
    for name in ("chat_template.jinja", "modeling_invented.py"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_the_result_says_what_it_came_to(model, tmp_path) -> None:
    result = quantize(model, "mxfp4", output=tmp_path / "out", model_free=True)
    stored = all_tensors(tmp_path / "out")
    assert result.bits.weight == pytest.approx(4 + 8 / 32)
    assert result.bits.activation == pytest.approx(4 + 8 / 32)
    assert result.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    assert result.bytes_before == sum(t.nbytes for t in all_tensors(model).values())
    assert result.export.schemes == {"MXFP4 W4A4 group 32": len(LINEARS)}
    assert result.recipe.rotation is None
    assert result.recipe.weights.rounding == "rtn"
    notes = "\n".join(result.notes)
    assert "smoothing, rotation, GPTQ, tuning are left out" in notes
    assert "model.layers.*.mlp.gate" in notes
    assert "1 stacks of experts' matrices stay in float" in notes


def test_what_the_recipe_keeps_stays(model, tmp_path) -> None:
    recipe = preset("fp8").edit(keep=["*.w2", "lm_head"])
    result = quantize(model, recipe, output=tmp_path / "out", model_free=True)
    name = f"{BLOCK0}.mlp.experts.0.w2.weight"
    assert torch.equal(all_tensors(tmp_path / "out")[name], all_tensors(model)[name])
    assert 8 < result.bits.weight < 16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert name.removesuffix(".weight") in config["quantization_config"]["ignore"]


def test_an_override_gives_a_linear_another_format(model, tmp_path) -> None:
    override = {"match": "*.w2", "weights": {"type": "float", "bits": 8, "granularity": "block"}}
    recipe = preset("fp8").edit(overrides=[override])
    result = quantize(model, recipe, output=tmp_path / "out", model_free=True)
    assert result.export.schemes == {"FP8 W8A8 channel": 6, "FP8 W8A8 block": 1}


class Killed(BaseException):
    """Ends a run as a signal does."""


def test_a_killed_run_goes_on_after_its_last_file_to_the_same_bytes(
    model, tmp_path, monkeypatch
) -> None:
    quantize(model, "w4a16-nvfp4", output=tmp_path / "whole", model_free=True)
    add, rounded = model_free._add_linear, []

    def dies(work, name, *arguments):
        if len(rounded) == 4:
            raise Killed
        rounded.append(name)
        add(work, name, *arguments)

    monkeypatch.setattr(model_free, "_add_linear", dies)
    with pytest.raises(Killed):
        quantize(model, "w4a16-nvfp4", output=tmp_path / "out", model_free=True)
    assert not (tmp_path / "out").exists()
    again = []
    monkeypatch.setattr(
        model_free,
        "_add_linear",
        lambda work, name, *rest: (again.append(name), add(work, name, *rest)),
    )
    quantize(model, "w4a16-nvfp4", output=tmp_path / "out", model_free=True, resume=True)
    assert set(rounded[:3]).isdisjoint(again)
    assert {*rounded, *again} == set(LINEARS)
    assert [*files_of(tmp_path / "out").values()] == [*files_of(tmp_path / "whole").values()]
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_output_is_not_written_again(model, tmp_path) -> None:
    first = quantize(model, "fp8", output=tmp_path / "out", model_free=True)
    before = files_of(tmp_path / "out")
    again = quantize(model, "fp8", output=tmp_path / "out", model_free=True)
    assert again.repeated
    assert not first.repeated
    assert (again.bits, again.bytes_after) == (first.bits, first.bytes_after)
    assert files_of(tmp_path / "out") == before
    with pytest.raises(SmoothqError, match="recipe"):
        quantize(model, "mxfp8", output=tmp_path / "out", model_free=True)


REFUSED = {
    "nvfp4": "w4a16-nvfp4",
    "w8a8-static": "activations.static",
    "tensor": "weights.granularity",
    "kv": "kv_cache",
    "embeddings": "embeddings",
    "keeps nothing": "matches no linear",
    "a part of q, k and v": "as one matrix",
    "groups": "no group of this recipe divides",
    "all": "no tensor is a linear",
}


def recipe_refused(kind: str) -> Any:
    w8a8 = preset("w8a8")
    return {
        "nvfp4": preset("nvfp4"),
        "w8a8-static": w8a8.edit(activations__static=True, activations__granularity="tensor"),
        "tensor": w8a8.edit(weights__granularity="tensor"),
        "kv": w8a8.edit(kv_cache={"bits": 8}),
        "embeddings": w8a8.edit(embeddings=8),
        "keeps nothing": w8a8.edit(keep=["*.q_prj"]),
        "a part of q, k and v": w8a8.edit(keep=["*.q_proj"]),
        "groups": preset("w4a16").edit(weights__group_size=48),
        "all": w8a8.edit(keep=["*"]),
    }[kind]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_text_or_a_class_is_refused_by_name(model, tmp_path, kind) -> None:
    with pytest.raises(RecipeError, match=REFUSED[kind]):
        quantize(model, recipe_refused(kind), output=tmp_path / "out", model_free=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_a_quantized_model_is_refused(tmp_path, config) -> None:
    invented(tmp_path / "model", **config)
    with pytest.raises(UnsupportedModelError, match=r"already quantized.*fp8"):
        quantize(tmp_path / "model", "fp8", output=tmp_path / "out", model_free=True)
    assert not (tmp_path / "out.partial").exists()


def test_tensors_that_are_codes_are_refused(tmp_path) -> None:
    tensors = invented(tmp_path / "model", shards=1)
    name = f"{BLOCK0}.mlp.experts.0.w1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model" / "model-0.safetensors")
    with pytest.raises(UnsupportedModelError, match="float8_e4m3fn"):
        quantize(tmp_path / "model", "fp8", output=tmp_path / "out", model_free=True)


def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path) -> None:
    tensors = invented(tmp_path / "model", shards=1)
    tensors[f"{BLOCK0}.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model" / "model-0.safetensors")
    with pytest.raises(NumericsError, match="o_proj"):
        quantize(tmp_path / "model", "fp8", output=tmp_path / "out", model_free=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_arguments_that_need_a_class_are_refused(model, tmp_path, data) -> None:
    for arguments in ({"data": data}, {"probe": 1}, {"max_memory": "1GB"}):
        with pytest.raises(RecipeError, match="model_free"):
            quantize(model, "fp8", output=tmp_path / "out", model_free=True, **arguments)
    with pytest.raises(RecipeError, match="name an output"):
        quantize(model, "fp8", model_free=True)


def test_the_command_says_what_stays(model, tmp_path, run) -> None:
    code, printed, _ = run("quantize", model, "--model-free", "--fp8", "-o", tmp_path / "out")
    assert code == 0
    assert "FP8 W8A8 channel: 7" in printed
    code, _, error = run("quantize", model, "--model-free", "--nvfp4", "-o", tmp_path / "none")
    assert code != 0
    assert "leave --model-free out" in error


@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_a_model_that_transformers_knows_has_the_logits_of_plain_rounding(tmp_path, form) -> None:
    """As the same recipe gives through the model's class, exported."""
    wide_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", form, output=tmp_path / "free", model_free=True)
    quantize(tmp_path / "model", result.recipe, output=tmp_path / "own")
    export(tmp_path / "own", tmp_path / "export")
    tokens = torch.randint(0, 96, (2, 16))
    with torch.no_grad():
        free, exported = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(
                tokens
            ).logits
            for name in ("free", "export")
        )
    torch.testing.assert_close(free, exported, rtol=0, atol=0)
