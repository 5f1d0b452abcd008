"""A written checkpoint, loaded by transformers: the same model or an error, never another one."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from smoothq import keep_packed, quantize
from smoothq.errors import CheckpointError, RecipeError
from smoothq.kernels import QuantizedInput
from smoothq.modules import QuantizedLinear
from tests.conftest import PRESETS, RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

TOKENS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory,
    float_checkpoint: Callable[[str], Path],
    data: Tensor,
) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """The model that `quantize` returns for a recipe, and its checkpoint; made once.

    Every recipe passes the last look with one wiring; others are compared with their float model.
    """
    made: dict[tuple[str, str], tuple[PreTrainedModel, Path]] = {}

    def of(recipe: str, architecture: str = "llama") -> tuple[PreTrainedModel, Path]:
        key = (recipe, architecture)
        if key not in made:
            out = tmp_path_factory.mktemp("quantized") / "model"
            source = float_checkpoint(architecture)
            looked_at = architecture == "llama"
            result = quantize(source, RECIPES[recipe], data=data, output=out, check=looked_at)
            made[key] = (result.load(), out)
        return made[key]

    return of


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def plain_unpack(stored: Tensor, columns: int) -> Tensor:
    """Codes by the format's description, written again: int64 (N, K)."""
    if stored.dtype == torch.int8:
        return stored.reshape(stored.shape[0], columns).long()
    blocks = [block.long() for block in stored.split(32, 1)]
    nibbles = torch.cat([half for block in blocks for half in (block % 16, block // 16)], 1)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)[:, :columns]


@pytest.mark.parametrize("recipe", RECIPES)
def test_loads_to_the_very_logits_of_the_model_that_was_returned(quantized, recipe) -> None:
    model, out = quantized(recipe)
    expected = logits(model)
    for device_map in ("auto", "cpu"):  # the model was loaded with None
        loaded = AutoModelForCausalLM.from_pretrained(out, device_map=device_map)
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        *itertools.product(["llama-untied"], PRESETS),
        *zip(["mistral", "qwen2", "qwen3", "phi3"], PRESETS, strict=True),
        *zip(["phi3", "mistral", "qwen2", "qwen3"], PRESETS, strict=True),
    ],
)
def test_every_family_loads_and_stays_near_its_float_model(quantized, recipe, architecture) -> None:
    loaded, _ = quantized(recipe, architecture)
    exact = logits(tiny_model(architecture, torch.float32))
    error = (logits(loaded) - exact).norm() / exact.norm()
    assert error < {"w8a8": 0.06, "w4a8": 0.5, "w4a16": 0.5, "w4a4": 0.8}[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_linear_equals_the_stored_codes_and_scales_in_float64(quantized, recipe) -> None:
    _, out = quantized(recipe)
    stored = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    generator = torch.Generator().manual_seed(3)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 21
    for name, linear in linears:
        x = torch.randn(2, 7, linear.in_features, generator=generator)
        codes = plain_unpack(stored[f"{name}.weight"], linear.in_features)
        step = stored[f"{name}.weight_scale"].double()
        multiplier = stored.get(f"{name}.weight_multiplier")
        if multiplier is not None:
            step = step * multiplier.double()
        zero = stored.get(f"{name}.weight_zero_point", torch.zeros(len(step), 1))
        codes = codes - zero.double().repeat_interleave(linear.in_features // zero.shape[1], 1)
        dense = codes * step.repeat_interleave(linear.in_features // step.shape[1], 1)
        got = linear(x)
        seen = linear.site_input(x)
        expected = as_float64(seen, linear.site_input.spec.group_size) @ dense.t()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def as_float64(seen: Tensor | QuantizedInput, group_size: int) -> Tensor:
    if isinstance(seen, Tensor):
        return seen.double()
    assert seen.codes.dtype == torch.int8
    values = seen.codes.double() * seen.scale.double()
    if seen.block_scale is None:
        return values
    values = values * seen.block_scale.double().repeat_interleave(group_size, -1).unsqueeze(1)
    return torch.stack(
        [row[:, order.argsort()] for row, order in zip(values, seen.order, strict=True)]
    )


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w4a4-rrs-calibrated"])
def test_save_pretrained_and_reload_changes_nothing(quantized, recipe, tmp_path) -> None:
    model, _ = quantized(recipe)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_generates_greedily_with_a_cache(quantized, recipe) -> None:
    model, _ = quantized(recipe)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert model.generate(TOKENS, **kwargs).shape == (2, 25)


def with_one_block(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the first block alone: the compiler takes its time for each."""
    copied = deepcopy(model)
    copied.model.layers = copied.model.layers[:1]
    return copied


@pytest.mark.slow
def test_compiles_whole(quantized) -> None:
    model = with_one_block(quantized("w4a4")[0])
    expected = logits(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(input_ids=TOKENS, use_cache=False).logits
    assert (got - expected).norm() / expected.norm() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_decode_steps_compile_to_machine_code(quantized, recipe) -> None:
    model = with_one_block(quantized(recipe)[0])

    def decoded(forward: Callable[..., Any]) -> torch.Tensor:
        cache = StaticCache(model.config, max_cache_len=24)
        model(TOKENS[:, :16], None, None, cache)
        steps = [forward(TOKENS[:, i : i + 1], None, None, cache) for i in range(16, 20)]
        return torch.cat([step.logits for step in steps], 1)

    torch.compiler.reset()
    with torch.no_grad():
        expected = decoded(model)
        found = decoded(torch.compile(model.forward, fullgraph=True))
    # Floats are added up in another order, and a code near a tie may be its neighbour.
    assert (found - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("recipe", ["w4a8", "w4a4-quarot", "w4a16", "w8a8"])
def test_weights_may_stay_packed(quantized, recipe) -> None:
    _, out = quantized(recipe)
    model = AutoModelForCausalLM.from_pretrained(out)
    expected, linear = logits(model), model.model.layers[0].mlp.gate_proj
    read = linear.bytes_read(tokens=512)
    keep_packed(model)
    assert torch.equal(logits(model), expected)
    halved = recipe == "w4a4-quarot"  # groups of 16 do not fit the packed product
    assert (linear.bytes_read(tokens=512) < 0.6 * read) == halved


def test_scales_survive_a_change_of_dtype(quantized) -> None:
    _, out = quantized("w4a8")
    model = AutoModelForCausalLM.from_pretrained(out)
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight_scale.clone()
    model.to(torch.bfloat16)
    assert linear.weight_scale.dtype == torch.float32
    assert torch.equal(linear.weight_scale, before)
    assert logits(model).dtype == torch.bfloat16


def test_tied_embeddings_stay_tied_under_rotation(quantized) -> None:
    _, out = quantized("w4a8")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exact = tiny_model("llama", torch.float32)
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight)


@pytest.mark.parametrize("architecture", ["llama", "llama-untied", "phi3"])
def test_dequantize_gives_a_stock_float_model(quantized, architecture) -> None:
    _, out = quantized("w4a8", architecture)
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(m, QuantizedLinear) for m in dense.modules())
    assert {type(m).__module__.split(".")[0] for m in dense.modules()} <= {"torch", "transformers"}
    assert not hasattr(dense.config, "quantization_config")
    assert isinstance(dense.model.layers[0].mlp.down_proj, nn.Linear)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in dense.model.layers)
    # What differs is the rounding of activations to 8 bits.
    assert (logits(dense) - expected).norm() / expected.norm() < 0.05


def run_python(code: str, *argv: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_model(quantized, tmp_path) -> None:
    model, out = quantized("w4a4")
    save_file({"tokens": TOKENS, "logits": logits(model)}, tmp_path / "expected.safetensors")
    result = run_python(
        "import sys, smoothq, torch, transformers\n"
        "from safetensors.torch import load_file\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "expected = load_file(sys.argv[2])\n"
        "got = model(input_ids=expected['tokens']).logits\n"
        "assert torch.equal(got, expected['logits'])\n",
        out,
        tmp_path / "expected.safetensors",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_process_without_smoothq_gets_an_error(quantized) -> None:
    outs = [quantized(recipe)[1] for recipe in ("w8a8", "w4a4")]
    result = run_python(
        "import sys, transformers\n"
        "for out in sys.argv[1:]:\n"
        "    try:\n"
        "        transformers.AutoModelForCausalLM.from_pretrained(out)\n"
        "    except Exception as error:\n"
        "        print('size' in str(error))\n"
        "assert 'smoothq' not in sys.modules\n",
        *outs,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "True"], result.stderr


@pytest.fixture
def edited(quantized, tmp_path) -> Callable[..., Path]:
    """A copy of the W4A4 checkpoint with its tensors or its config edited."""

    def edit(
        tensors: Callable[[dict[str, Tensor]], object] | None = None,
        config: Callable[[dict], object] | None = None,
    ) -> Path:
        _, out = quantized("w4a4")
        copy = tmp_path / "edited"
        shutil.copytree(out, copy)
        if tensors is not None:
            stored = load_file(copy / "model.safetensors")
            tensors(stored)
            save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            values = json.loads((copy / "config.json").read_text())
            config(values["quantization_config"])
            (copy / "config.json").write_text(json.dumps(values))
        return copy

    return edit


SCALE = "model.layers.1.mlp.up_proj.weight_scale"


def test_a_missing_tensor_is_an_error(edited) -> None:
    copy = edited(tensors=lambda stored: stored.pop(SCALE))
    with pytest.raises(CheckpointError, match=f"missing.*{SCALE}"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_an_extra_tensor_is_an_error(edited) -> None:
    copy = edited(tensors=lambda stored: stored.update(stray=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"unknown.*stray"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_tensor_of_another_shape_is_an_error(edited) -> None:
    copy = edited(tensors=lambda stored: stored.update({SCALE: torch.ones(3, 1)}))
    with pytest.raises(CheckpointError, match=SCALE):
        AutoModelForCausalLM.from_pretrained(copy)


def test_integers_of_another_dtype_are_an_error(edited) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    copy = edited(tensors=lambda stored: stored.update({name: stored[name].view(torch.int8)}))
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_recipe_that_cannot_be_is_an_error(edited) -> None:
    copy = edited(config=lambda values: values["recipe"]["weights"].update(bits=1))
    with pytest.raises(RecipeError, match=r"weights\.bits"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_rotation_that_is_not_the_recipes_is_an_error(edited) -> None:
    copy = edited(config=lambda values: values["recipe"].update(seed=1))
    with pytest.raises(CheckpointError, match="rotations"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_rotation_whose_hash_differs_is_an_error(edited) -> None:
    copy = edited(config=lambda values: values["rotations"][0].update(sha256="0" * 64))
    with pytest.raises(CheckpointError, match="sha256"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_fields_of_a_newer_writer_survive(edited, tmp_path) -> None:
    copy = edited(config=lambda values: values.update(novelty={"a": 1}))
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["novelty"] == {"a": 1}
    assert config["quantization_config"]["quant_method"] == "smoothq"


@pytest.mark.parametrize("way", ["a PeftModel", "load_adapter"])
def test_an_adapter_is_refused_by_the_name_of_what_it_would_change(
    quantized, tmp_path, way
) -> None:
    """It was trained on inputs that are smoothed and rotated here; merge it before quantizing."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(tiny_model("llama", torch.float32), lora).save_pretrained(tmp_path)
    _, out = quantized("w4a8")
    model = AutoModelForCausalLM.from_pretrained(out)
    load = model.load_adapter
    if way == "a PeftModel":
        load = partial(peft.PeftModel.from_pretrained, model)
    with pytest.raises(ValueError, match=r"QuantizedLinear.* is not supported"):
        load(str(tmp_path))
