"""An export as others read it: by transformers' own reader of the format, with no code of ours."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    PreTrainedModel,
)

from smoothq import Recipe, export, quantize
from smoothq.advisor.vllm_kernels import (
    BLOCKS,
    DEVICES,
    kernel_of,
    layer_kernels,
    remarks,
    short,
)
from smoothq.errors import CheckpointError, RecipeError
from smoothq.export.reader import ExportReader
from smoothq.export.schemes import Scheme, pack_words, schemes_of
from smoothq.kernels import highest_code
from smoothq.modules import InputQuantizer, QuantizedLinear
from smoothq.plan.portability import export_blockers, make_exportable, reader_clip
from smoothq.plan.resolve import make_plan
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

pytest.importorskip("compressed_tensors")

RTN = RECIPES["w8a8-rtn"]
GROUPS = RTN.edit(weights__granularity="group", weights__group_size=16)
FORMATS: dict[str, Recipe] = {
    "W8A8 channel": RTN,
    "W8A8 channel, smoothed": RECIPES["w8a8"],
    "W8A8 channel, static": RECIPES["w8a8-static"],
    "W8A8 group": GROUPS,
    "W8A16 channel": RTN.edit(activations__bits=16),
    "W8A16 group": GROUPS.edit(activations__bits=16),
    "W4A16 channel": RTN.edit(activations__bits=16, weights__bits=4),
    "W4A16 group": RECIPES["w4a16-float-groups"],
    "W4A16 multipliers": RECIPES["w4a16"],
    "W4A16 zero points": RECIPES["w4a16-asymmetric"],
    "W8A16 zero points": RTN.edit(activations__bits=16, weights__symmetric=False),
    "W4A8 channel": RTN.edit(weights__bits=4),
    "W4A8 multipliers": RECIPES["w4a8"],
    "W4A4 multipliers": RECIPES["w4a4"],
    "W4A4 channel": RECIPES["w4a4-smoothrot"],
}
EXACT = [name for name in FORMATS if "A16" in name or "static" in name]
DENSE = [
    *("llama", "llama-untied", "qwen2", "qwen3", "phi3", "glm4", "gemma2", "gemma3", "olmo2"),
    *("cohere", "opt", "bloom", "bloom-untied", "gpt_neox"),
]
Made = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory, data) -> Callable[..., Made]:
    """Our model of a wiring and a format, and the directory of its export, made once."""
    place = tmp_path_factory.mktemp("exports")
    found: dict[tuple[str, str], Made] = {}

    def of(wiring: str, form: str) -> Made:
        if (wiring, form) not in found:
            model = tiny_model(wiring, torch.float32)
            # Tuned or not, a checkpoint has the same parts to export.
            recipe, _ = make_exportable(model, FORMATS[form].edit(tuning=None))
            out = place / f"{wiring} {form}"
            ours = quantize(model, recipe, data=data, output=out / "own", check=False).load()
            export(out / "own", out / "export")
            found[wiring, form] = ours, out / "export"
        return found[wiring, form]

    return of


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


def read(directory: Path, whole: bool = False) -> PreTrainedModel:
    """What transformers makes of an export. whole: dequantized while it is loaded."""
    config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if whole else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **config)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


@pytest.mark.parametrize(
    ("wiring", "form"),
    [
        *(("llama-untied", form) for form in EXACT),
        ("llama", "W8A8 channel, static"),
        ("llama", "W4A16 multipliers"),  # where a rotation unties its head
    ],
)
def test_logits_are_ours_where_readers_find_no_scale_themselves(made, tokens, wiring, form) -> None:
    ours, directory = made(wiring, form)
    # transformers makes no place for packed zero points where it keeps codes.
    theirs = read(directory, whole="zero points" in form)
    assert relative(logits(ours, tokens), logits(theirs, tokens)) < 1e-5


@pytest.mark.parametrize("wiring", DENSE)
def test_every_dense_family_can_be_exported(made, tokens, wiring) -> None:
    ours, directory = made(wiring, "W4A16 multipliers")
    assert relative(logits(ours, tokens), logits(read(directory), tokens)) < 1e-5


def test_a_falcon_is_exported_per_channel(made, tokens) -> None:
    ours, directory = made("falcon-groups", "W8A8 channel, static")
    assert relative(logits(ours, tokens), logits(read(directory), tokens)) < 1e-5


def test_bfloat16_moves_logits_by_its_rounding_alone(made, tokens) -> None:
    ours, directory = made("llama", "W4A16 multipliers")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert relative(logits(ours, tokens), logits(theirs, tokens).float()) < 0.03


@pytest.mark.parametrize("form", FORMATS)
def test_codes_and_scales_are_ours(made, form) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    ours, directory = made("llama-untied", form)
    stored = load_file(directory / "model.safetensors")
    for name, linear in quantized_linears(ours):
        weight = linear.quantized_weight()
        step = weight.scales.step(torch.float32)
        if f"{name}.weight" in stored:
            codes = stored[f"{name}.weight"]
        else:
            shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
            bits = linear.spec.grid.bits
            codes = unpack_from_int32(stored[f"{name}.weight_packed"], bits, shape)
        assert codes.dtype == torch.int8
        assert torch.equal(codes, weight.codes)
        assert torch.equal(stored[f"{name}.weight_scale"], step)
        if weight.scales.zero is not None:
            packed, zero = stored[f"{name}.weight_zero_point"], weight.scales.zero
            assert torch.equal(unpack_from_int32(packed, bits, zero.shape, packed_dim=0), zero)
        assert torch.equal(stored[f"{name}.bias"], linear.bias)


@pytest.mark.parametrize("form", [name for name in FORMATS if name not in EXACT])
def test_a_linear_multiplies_the_same_integers(made, tokens, form) -> None:
    """On equal inputs, under the reader's rule for a token's scale."""
    ours, directory = made("llama-untied", form)
    theirs = read(directory)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, _ in quantized_linears(ours):
        theirs.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    logits(theirs, tokens)
    assert seen
    for name, linear in quantized_linears(ours):
        x, y = seen[name]
        highest = highest_code(linear.site_input.spec.bits)
        scale = x.abs().amax(-1, keepdim=True) / (highest + 0.5)
        codes = (x / scale).round().clamp(-highest - 1, highest)
        weight = linear.quantized_weight().dequantize(torch.float64)
        wanted = (codes.double() * scale.double()) @ weight.T + linear.bias.double()
        assert relative(wanted, y.double()) < 1e-5, name


def quantized_linears(model: PreTrainedModel) -> Iterator[tuple[str, QuantizedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def test_servable_clips_activations_as_readers_do(made) -> None:
    """So that our own perplexity of such a checkpoint is that of the export."""
    ours, _ = made("llama", "W4A4 multipliers")
    specs = [m.spec for m in ours.modules() if isinstance(m, InputQuantizer)]
    assert all(spec.clip == reader_clip(4) for spec in specs)
    x = torch.randn(3, specs[0].width, generator=torch.Generator().manual_seed(0))
    codes, scale, *_ = next(m for m in ours.modules() if isinstance(m, InputQuantizer))(x)
    torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / 7.5)
    assert codes.min() >= -8


def test_tied_embeddings_are_untied_where_a_rotation_folds_into_both(made) -> None:
    _, directory = made("llama", "W4A16 multipliers")
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    stored = load_file(directory / "model.safetensors")
    head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    assert head.shape == embedding.shape
    assert not torch.equal(head, embedding)
    assert torch.equal(stored["model.norm.weight"], torch.ones(len(stored["model.norm.weight"])))
    smooth = made("llama", "W8A8 channel, smoothed")[1]
    assert json.loads((smooth / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_bytes_are_reported(tmp_path, data) -> None:
    model = tiny_model("llama", torch.float32)
    for name in ("W4A16 multipliers", "W8A8 channel"):
        recipe, _ = make_exportable(model, FORMATS[name])
        quantize(model, recipe, data=data, output=tmp_path / name, check=False)
        exported = export(tmp_path / name, tmp_path / f"{name} export")
        stored = load_file(tmp_path / f"{name} export" / "model.safetensors")
        assert exported.bytes_after == sum(tensor.nbytes for tensor in stored.values())
        head = stored["lm_head.weight"].nbytes if "lm_head.weight" in stored else 0
        assert exported.added_bytes == head
        assert sum(exported.schemes.values()) == 21


def test_no_float_copy_of_a_linear_is_made(made, monkeypatch) -> None:
    _, directory = made("llama-untied", "W8A8 channel")
    folded = ExportReader(directory.parent / "own", "a format")
    for linear in folded.linears():
        assert linear.weight.codes.dtype == torch.int8
    floats = {each.name for each in folded.floats()}
    assert floats == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in range(3) for n in _NORMS),
    }


_NORMS = ("input", "post_attention")


def test_what_is_kept_in_float_is_named_to_the_reader(tmp_path, data, tokens) -> None:
    model = tiny_model("llama-untied", torch.float32)
    recipe = FORMATS["W4A16 group"].edit(keep=["*.1.mlp.down_proj", "*.2.self_attn.[qkv]_proj"])
    ours = quantize(model, recipe, data=data, output=tmp_path / "own", check=False).load()
    export(tmp_path / "own", tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    kept = {"model.layers.1.mlp.down_proj", "lm_head"}
    kept |= {f"model.layers.2.self_attn.{part}_proj" for part in "qkv"}
    assert set(config["quantization_config"]["ignore"]) == kept
    theirs = read(tmp_path / "export")
    assert type(theirs.get_submodule("model.layers.1.mlp.down_proj")) is nn.Linear
    assert relative(logits(ours, tokens), logits(theirs, tokens)) < 1e-5


def test_mixed_formats_are_groups_of_names(tmp_path, data, tokens) -> None:
    model = tiny_model("llama-untied", torch.float32)
    wide = {"bits": 8, "granularity": "channel"}
    recipe = FORMATS["W4A16 group"].edit(overrides=[{"match": "*.mlp.*_proj", "weights": wide}])
    ours = quantize(model, recipe, data=data, output=tmp_path / "own", check=False).load()
    exported = export(tmp_path / "own", tmp_path / "export")
    assert exported.schemes == {"W4A16 group 16": 12, "W8A16 channel": 9}
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    names = [name for name, _ in quantized_linears(ours)]
    assert {str(scheme) for scheme in schemes_of(config, names).values()} == set(exported.schemes)
    assert relative(logits(ours, tokens), logits(read(tmp_path / "export"), tokens)) < 1e-5


REFUSED = {
    "rotated": (RECIPES["w4a4-quarot"], "rotated while the model runs", "rotation.down: false"),
    "smoothed": (RECIPES["w4a4-rs"], "smoothed while the model runs", "runtime_smoothing: null"),
    "live": (RECIPES["w4a4-rrs-live"], "smoothed while", "runtime_smoothing: null"),
    "calibrated": (RECIPES["w4a4-rrs-calibrated"], "smoothed while", "runtime_smoothing: null"),
    "cache": (RECIPES["w8a8-kv4"], "keys, values", "kv_cache: null"),
    "tensor": (RECIPES["w8a8-tensor"], "one scale a tensor", "activations.granularity: token"),
    "table": (RTN.edit(embeddings=8), "embedding and head", "embeddings: 16"),
    "clip": (RTN.edit(activations__clip_ratio=0.9), "0.9 of each token's", "clip_ratio"),
    "sign": (RTN.edit(activations__full_range=True), "sign", "full_range: false"),
    "bits": (RTN.edit(activations__bits=6), "6-bit", "4, 8 or 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_we_can_run_is_refused_with_what_to_take(tmp_path, data, case) -> None:
    recipe, what, instead = REFUSED[case]
    model = tiny_model("llama", torch.float32)
    quantize(model, recipe.edit(tuning=None), data=data, output=tmp_path / "own", check=False)
    with pytest.raises(RecipeError) as refusal:
        export(tmp_path / "own", tmp_path / "export")
    assert what in str(refusal.value)
    assert instead in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


@pytest.mark.parametrize("case", [name for name in REFUSED if name != "bits"])
def test_servable_takes_that_recipe(case) -> None:
    recipe, _, instead = REFUSED[case]
    model = tiny_model("llama", torch.float32)
    found, changed = make_exportable(model, recipe)
    assert not export_blockers(model, make_plan(model, found))
    assert any(instead in line for line in changed)
    assert make_exportable(model, found) == (found, ())


@pytest.mark.parametrize(
    ("wiring", "what"),
    [
        ("mixtral", "experts are held apart"),
        ("gpt2", "it is a Conv1D"),
        ("falcon", "it is a FalconLinear"),
    ],
)
def test_a_family_that_does_not_fit_is_named(wiring, what) -> None:
    model = tiny_model(wiring, torch.float32)
    recipe, _ = make_exportable(model, RECIPES["w4a16"])
    assert any(what in str(each) for each in export_blockers(model, make_plan(model, recipe)))


@pytest.mark.parametrize("wiring", ["opt", "bloom", "gpt_neox", "gemma2", "olmo2"])
def test_a_rotation_that_does_not_fold_is_left_out(wiring) -> None:
    model = tiny_model(wiring, torch.float32)
    _, changed = make_exportable(model, RECIPES["w4a16"])
    assert "rotation.residual: false" in changed


def test_linears_that_servers_merge_need_one_format() -> None:
    model = tiny_model("llama", torch.float32)
    for recipe in (
        RTN.edit(keep=["*.v_proj"]),
        RECIPES["w4a16-float-groups"].edit(
            overrides=[{"match": "*.v_proj", "weights": {"bits": 8}}]
        ),
    ):
        (blocker,) = export_blockers(model, make_plan(model, recipe))
        assert "one matrix" in blocker.what


@pytest.mark.slow
def test_an_export_is_loaded_without_smoothq(made, tmp_path) -> None:
    ours, directory = made("llama", "W4A16 multipliers")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"m = AutoModelForCausalLM.from_pretrained({str(directory)!r}, dtype=torch.float32); "
        "torch.save(m(torch.arange(9)[None]).logits, sys.argv[1]); "
        "assert 'smoothq' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "logits")], check=True)
    theirs = torch.load(tmp_path / "logits")
    assert relative(logits(ours, torch.arange(9)[None]), theirs) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 8, 13, 64])
def test_words_are_those_of_the_formats_own_library(bits, columns) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    low = -(1 << (bits - 1))
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(low, -low, (5, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("form", FORMATS)
def test_the_config_is_one_of_the_formats_own_library(made, form) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    _, directory = made("llama-untied", form)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert QuantizationConfig.model_validate(config).format == config["format"]


def test_what_is_none_of_ours_is_refused(tmp_path, float_checkpoint, made) -> None:
    _, directory = made("llama", "W8A8 channel")
    for source in (float_checkpoint("llama"), directory):
        with pytest.raises(CheckpointError, match="not quantized by smoothq"):
            export(source, tmp_path / "export")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        export(directory.parent / "own", tmp_path / "full")


def test_a_torn_checkpoint_leaves_nothing_behind(tmp_path, data) -> None:
    quantize(tiny_model("llama", torch.float32), RTN, data=data, output=tmp_path / "own")
    path = tmp_path / "own" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        export(tmp_path / "own", tmp_path / "export")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["own"]


W8A8 = Scheme(8, "channel", None, "token", 8)
W4A16 = Scheme(4, "group", 128, "float", 16)
W4A8 = Scheme(4, "group", 32, "token", 8)


@pytest.mark.parametrize(
    ("scheme", "shape", "kernels"),
    [
        (W8A8, (960, 576), ("CPUInt8ScaledMM", "CutlassInt8ScaledMM", "CutlassInt8ScaledMM")),
        (W4A16, (1024, 1024), ("CPUWNA16", "Marlin", "Machete")),
        (W4A16, (1000, 1024), (None, "Marlin", "Humming")),
        (replace(W4A16, group_size=32), (1024, 1024), ("CPUWNA16", "Marlin", "Humming")),
        (replace(W4A16, group_size=256), (1024, 1024), ("CPUWNA16", "TritonW4A16", "Humming")),
        (replace(W4A16, group_size=16), (1024, 1024), ("CPUWNA16", "Humming", "Humming")),
        (replace(W4A16, bits=8), (1024, 1024), (None, "Marlin", "Machete")),
        (replace(W4A16, bits=8, group_size=256), (1024, 1024), (None, "Humming", "Humming")),
        (replace(W4A16, bits=8, symmetric=False), (1024, 1024), (None, "Humming", "Machete")),
    ],
)
def test_the_first_kernel_that_takes_a_layer_is_named(scheme, shape, kernels) -> None:
    found = [kernel_of(scheme, shape, device) for device in ("CPU", "A100", "H100")]
    assert found == [kernel and f"{kernel}LinearKernel" for kernel in kernels]


def of_llama(scheme: Scheme) -> list[Any]:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    group = {"targets": ["Linear"], **scheme.arguments()}
    return layer_kernels(model, {"ignore": [], "config_groups": {"group_0": group}})


def test_what_reads_one_tensor_is_one_matrix_there() -> None:
    assert [(each.layers, each.count, each.shape) for each in of_llama(W8A8)] == [
        ("qkv", 2, (512, 256)),
        ("o", 2, (256, 256)),
        ("gate_up", 2, (1024, 256)),
        ("down", 2, (256, 512)),
    ]


def test_activations_that_would_stay_in_16_bits_are_told() -> None:
    found = of_llama(W4A8)
    assert all(each.floats == DEVICES for each in found)
    assert "leave these activations in 16 bits" in remarks(found)[0]
    # Humming, the kernel of Hopper here, rounds them where weights have no groups.
    found = of_llama(replace(W4A8, strategy="channel", group_size=None))
    by_humming = [each for each in found if each.kernels["H100"] == "HummingLinearKernel"]
    assert all("H100" not in each.floats for each in by_humming)
    assert not any(each.floats for each in of_llama(W8A8) + of_llama(W4A16))


FP8 = Scheme(8, "channel", None, "token", 8, type="float", input_type="float")
FP8_BLOCKS = replace(FP8, strategy="block", inputs="group", input_group=128)
MXFP8 = replace(FP8, strategy="group", group_size=32, inputs="group", input_group=32)
MXFP4 = replace(MXFP8, bits=4, input_bits=4)
NVFP4 = replace(MXFP4, strategy="tensor_group", group_size=16, inputs="tensor_group")
W4A_FP8 = replace(W4A8, input_type="float", group_size=128)


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [  # by device: CPU, A100, L4, H100, B200, MI300X, MI350X
        (
            FP8,
            "not known|HummingFP8|CutlassFP8|CutlassFP8|CutlassFP8|RowWiseTorchFP8|RowWiseTorchFP8",
        ),
        (
            replace(FP8, strategy="tensor", inputs="static"),
            "not known|HummingFP8|CutlassFP8|CutlassFP8|FlashInferFP8|ROCmFP8|ROCmFP8",
        ),
        (
            replace(FP8, inputs="float"),
            "none|HummingFP8|HummingFP8|HummingFP8|HummingFP8|none|none",
        ),
        (
            FP8_BLOCKS,
            f"not known|HummingFP8|MarlinFP8|{BLOCKS}|{BLOCKS}|TritonFp8Block|TritonFp8Block",
        ),
        (
            MXFP8,
            "none|MarlinMxfp8|MarlinMxfp8|HummingMxfp8|FlashInferCutedslMxfp8|EmulationMxfp8"
            "|RocmDotScaledMxfp8",
        ),
        (
            MXFP4,
            "none|MarlinMxFp4|MarlinMxFp4|HummingMxFp4|FlashInferMxFp4|EmulationMxfp4|AiterMxfp4",
        ),
        (
            NVFP4,
            "none|MarlinNvFp4|MarlinNvFp4|HummingNvFp4|FlashInferCuteDslNvFp4|EmulationNvFp4"
            "|EmulationNvFp4",
        ),
        (
            replace(NVFP4, inputs="float"),
            "none|MarlinNvFp4|MarlinNvFp4|HummingNvFp4|FlashInferCuteDslNvFp4W4A16|none|none",
        ),
        (W4A_FP8, "none|none|none|CutlassW4A8|none|none|none"),
        (replace(W4A_FP8, group_size=32), "none|none|none|none|none|none|none"),
        (replace(W4A16, bits=3), "none|Humming|Humming|Humming|Humming|none|none"),
        (replace(W4A16, bits=2), "none|Humming|Humming|Humming|Humming|none|none"),
        (W8A8, "CPUInt8|CutlassInt8|CutlassInt8|CutlassInt8|not known|TritonInt8|TritonInt8"),
        (W4A16, "CPUWNA16|Marlin|Marlin|Machete|Marlin|TritonW4A16|TritonW4A16"),
    ],
)
def test_each_device_has_a_kernel_of_each_format_or_none(scheme, kernels) -> None:
    shown = [short(kernel_of(scheme, (1024, 1024), device)) for device in DEVICES]
    assert shown == kernels.split("|")


def test_products_of_few_bits_are_told_from_weights_alone() -> None:
    layers = of_llama(NVFP4)
    assert {each.floats for each in layers} == {("A100", "L4, L40S")}
    told = " ".join(remarks(layers))
    assert "Emulation rounds activations" in told
    assert "What Humming rounds activations" in told
    assert "linear-backend" not in told
    assert {each.floats for each in of_llama(FP8)} == {("A100",)}
    weights_only = of_llama(replace(NVFP4, inputs="float"))
    assert not any(each.floats for each in weights_only)
    assert remarks(weights_only) == [remarks(layers)[0]]
    mx = of_llama(replace(MXFP8, inputs="float"))
    assert {each.rounds for each in mx} == {("B200, B300", "MI350X")}
    assert "would quantize these activations" in " ".join(remarks(mx))


def test_small_matrices_in_mxfp8_go_to_marlin_on_blackwell() -> None:
    assert kernel_of(MXFP8, (64, 1024), "B200, B300") == "MarlinMxfp8LinearKernel"


def test_what_depends_on_more_than_the_device_is_not_claimed() -> None:
    assert "not known here depends" in " ".join(remarks(of_llama(FP8)))
    assert kernel_of(replace(MXFP4, input_bits=8), (128, 128), "B200, B300") == "not known"


def test_a_config_of_another_kind_is_refused() -> None:
    group = {"targets": ["Linear"], **W8A8.arguments()}
    group["weights"] = group["weights"] | {"type": "float"}
    with pytest.raises(CheckpointError, match="not one of ours"):
        schemes_of({"ignore": [], "config_groups": {"group_0": group}}, ["a"])
    with pytest.raises(CheckpointError, match="not one of ours"):
        schemes_of({}, ["a"])
