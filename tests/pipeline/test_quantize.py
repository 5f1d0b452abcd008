"""The pass over the blocks: what it leaves unchanged, what it refuses, what a recipe promises."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from smoothq import preset, quantize
from smoothq.checkpoint import writer as writer_module
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.errors import (
    CalibrationError,
    CheckpointError,
    DeviceError,
    NumericsError,
    RecipeError,
    UnsupportedModelError,
)
from smoothq.modules import QuantizedLinear
from smoothq.pipeline.run import quantize_checkpoint
from tests.conftest import CAUSAL, RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

LENGTH = 24
TOKENS = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def quantized(
    float_checkpoint: Callable[[str], Path], data: Tensor
) -> Callable[[str], PreTrainedModel]:
    made: dict[str, PreTrainedModel] = {}

    def of(recipe: str) -> PreTrainedModel:
        if recipe not in made:
            source = float_checkpoint("llama")
            made[recipe] = quantize(source, RECIPES[recipe], data=data, check=False)
        return made[recipe]

    return of


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **kwargs: object) -> Tensor:
    return model(input_ids=tokens, **kwargs).logits


@torch.no_grad()
def jitter_floor(model: PreTrainedModel, tokens: Tensor) -> float:
    """How far a change of 1e-6 in the embeddings drives the logits: rounding makes it chaotic."""
    exact = model.get_input_embeddings()(tokens)
    base = model(inputs_embeds=exact).logits
    moved = []
    for seed in range(8):
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        moved.append((model(inputs_embeds=exact * (1 + 1e-6 * noise)).logits - base).abs().max())
    return max(1e-5, float(torch.stack(moved).max()))


@pytest.mark.parametrize("recipe", CAUSAL)
def test_later_tokens_do_not_move_earlier_logits(quantized, recipe) -> None:
    model = quantized(recipe)
    changed = TOKENS.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % VOCABULARY
    difference = (logits(model, TOKENS) - logits(model, changed))[:, :15].abs().max()
    assert difference <= jitter_floor(model, TOKENS)


@pytest.mark.parametrize("recipe", CAUSAL)
def test_prefill_and_a_decode_step_agree_with_a_longer_prefill(quantized, recipe) -> None:
    model = quantized(recipe)
    cache = DynamicCache(config=model.config)
    logits(model, TOKENS[:, :-1], past_key_values=cache, use_cache=True)
    step = logits(model, TOKENS[:, -1:], past_key_values=cache, use_cache=True)
    whole = logits(model, TOKENS)[:, -1:]
    assert (step - whole).abs().max() <= jitter_floor(model, TOKENS)


@pytest.mark.parametrize("recipe", [*CAUSAL, "w4a4-rrs-live"])
def test_a_left_padded_batch_agrees_with_its_prompts_alone(quantized, recipe) -> None:
    model = quantized(recipe)
    short = TOKENS[:, 9:]
    padded = torch.cat([torch.ones(1, 9, dtype=torch.long), short], 1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = torch.cat([TOKENS, padded])
    together = logits(model, batch, attention_mask=mask, position_ids=positions)
    assert (together[:1] - logits(model, TOKENS)).abs().max() <= jitter_floor(model, TOKENS)
    alone = logits(model, short)
    assert (together[1:, 9:] - alone).abs().max() <= jitter_floor(model, short)


def test_the_live_scope_is_not_causal_and_says_so(quantized) -> None:
    assert not RECIPES["w4a4-rrs-live"].causal
    model = quantized("w4a4-rrs-live")
    changed = TOKENS.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % VOCABULARY
    difference = (logits(model, TOKENS) - logits(model, changed))[:, :15].abs().max()
    assert difference > 10 * jitter_floor(model, TOKENS)


def test_a_model_in_memory_gives_the_same_as_its_checkpoint(
    quantized, float_checkpoint, data
) -> None:
    model = AutoModelForCausalLM.from_pretrained(float_checkpoint("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    from_memory = quantize(model, RECIPES["w4a8"], data=data, check=False)
    from_disk = quantized("w4a8")
    assert torch.equal(logits(from_memory, TOKENS), logits(from_disk, TOKENS))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_same_recipe_gives_the_same_bytes(float_checkpoint, data, tmp_path) -> None:
    for out in (tmp_path / "first", tmp_path / "second"):
        quantize(float_checkpoint("phi3"), RECIPES["w4a4"], data=data, output=out, check=False)
    first, second = (tmp_path / out / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_stays_float_keeps_the_dtype_of_the_config_or_takes_the_recipes(
    float_checkpoint, tmp_path, dtype
) -> None:
    source = tmp_path / "bfloat16"
    float_model = AutoModelForCausalLM.from_pretrained(
        float_checkpoint("llama"), dtype=torch.bfloat16
    )
    float_model.save_pretrained(source)
    recipe = preset("w8a8", "rtn").edit(dtype=dtype)
    quantize(source, recipe, output=tmp_path / "out", check=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = torch.bfloat16 if dtype == "auto" else torch.float32
    assert stored["model.embed_tokens.weight"].dtype == expected
    assert stored["model.norm.weight"].dtype == expected
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected


def test_shards_load_as_one_model(quantized, float_checkpoint, data, tmp_path) -> None:
    source, out = float_checkpoint("llama"), tmp_path / "shards"
    writer = CheckpointWriter(out, shard_bytes=20_000)
    quantize_checkpoint(open_source(source), RECIPES["w8a8"], writer, data=data)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    one = quantized("w8a8")
    many = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(one, TOKENS), logits(many, TOKENS))


def test_an_input_is_quantized_once_for_all_its_readers(quantized) -> None:
    model = quantized("w8a8")
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.up_proj, QuantizedLinear)
    x = torch.randn(1, 3, 48)
    assert mlp.gate_up_input(x) is mlp.gate_up_input(x)
    assert mlp.gate_up_input(x) is not mlp.gate_up_input(x.clone())


def test_gptq_beats_rounding_to_nearest_on_its_calibration_text(float_checkpoint) -> None:
    source = float_checkpoint("llama")
    exact = logits(tiny_model("llama", torch.float32), TOKENS)
    tokens = TOKENS.repeat(4, 1)
    error = {}
    for rounding in ("rtn", "gptq"):
        recipe = RECIPES["w4a16"].edit(weights__rounding=rounding, tuning=None)
        got = logits(quantize(source, recipe, data=tokens, check=False), TOKENS)
        error[rounding] = (got - exact).norm()
    assert error["gptq"] < error["rtn"]


def refused(
    error: type[Exception], match: str, tmp_path: Path, *args: object, **kwargs: object
) -> None:
    out = tmp_path / "refused"
    with pytest.raises(error, match=match):
        quantize(*args, output=out, **kwargs)
    assert not out.exists()
    assert not out.with_name("refused.partial").exists()


def test_an_architecture_of_which_little_can_be_claimed_is_quantized(tmp_path) -> None:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2
    )
    model = NanoChatForCausalLM(config).eval()
    result = quantize(model, preset("w8a8", "rtn"), output=tmp_path / "out")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected, given = model(tokens).logits, result.load()(tokens).logits
    assert 0 < (given - expected).norm() < 0.1 * expected.norm()


def test_refuses_a_model_that_is_already_quantized(float_checkpoint, data, tmp_path) -> None:
    out = tmp_path / "quantized"
    source, recipe = float_checkpoint("llama"), preset("w8a8", "rtn")
    model = quantize(source, recipe, data=data, output=out, check=False).load()
    for again in (out, model):
        refused(UnsupportedModelError, "already quantized", tmp_path, again, RECIPES["w8a8"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite_and_names_the_tensor(
    float_checkpoint, tmp_path, value
) -> None:
    source = tmp_path / "float"
    AutoModelForCausalLM.from_pretrained(float_checkpoint("llama")).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    match = r"model\.layers\.2\.mlp\.up_proj\.weight.*NaN or Inf"
    refused(NumericsError, match, tmp_path, source, preset("w8a8", "rtn"))


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", "w4a16"])
def test_refuses_activations_that_are_not_finite_and_names_the_input(
    data, tmp_path, recipe
) -> None:
    model = tiny_model("llama", torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e30
    match = r"layers\.1.*down.*NaN or Inf"
    refused(NumericsError, match, tmp_path, model, RECIPES[recipe], data=data)


def test_refuses_a_group_size_that_does_not_divide(float_checkpoint, data, tmp_path) -> None:
    recipe = RECIPES["w4a16"].edit(weights__group_size=36)
    match = "q_proj.*36 does not divide 48"
    refused(RecipeError, match, tmp_path, float_checkpoint("llama"), recipe, data=data)


def test_refuses_a_device_without_kernels(float_checkpoint, tmp_path) -> None:
    source = float_checkpoint("llama")
    refused(DeviceError, "cuda", tmp_path, source, preset("w8a8", "rtn"), device="cuda:0")


def test_refuses_a_calibration_text_shorter_than_one_sequence(float_checkpoint, tmp_path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("only a few characters")
    recipe = RECIPES["w8a8"].edit(calibration__source=str(text))
    refused(CalibrationError, "short.txt", tmp_path, float_checkpoint("llama"), recipe)


def test_refuses_to_calibrate_without_a_tokenizer(tmp_path) -> None:
    refused(CalibrationError, "tokenizer", tmp_path, tiny_model("llama"), RECIPES["w8a8"])


def test_refuses_an_output_that_is_not_empty_unless_told(float_checkpoint, tmp_path) -> None:
    source, recipe, out = float_checkpoint("llama"), preset("w8a8", "rtn"), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(CheckpointError, match=r"not empty.*overwrite=True"):
        quantize(source, recipe, output=out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    quantize(source, recipe, output=out, overwrite=True)
    assert not (out / "precious").exists()
    assert (out / "config.json").is_file()


def test_refuses_a_disk_that_is_too_small_before_any_work(
    float_checkpoint, tmp_path, monkeypatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)
    refused(CheckpointError, "disk", tmp_path, float_checkpoint("llama"), preset("w8a8", "rtn"))


def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(
    float_checkpoint, tmp_path, monkeypatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.ShardWriter, "add", full)
    refused(
        CheckpointError, "disk is full", tmp_path, float_checkpoint("llama"), preset("w8a8", "rtn")
    )


def test_an_interrupted_run_leaves_only_its_partial_output(float_checkpoint, tmp_path) -> None:
    def interrupt(block: int, blocks: int, stage: str) -> None:
        if block == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(float_checkpoint("llama"), preset("w8a8", "rtn"), output=out, progress=interrupt)
    assert not out.exists()
    assert out.with_name("out.partial").is_dir()


def test_a_missing_tensor_in_the_source_is_named(float_checkpoint, tmp_path) -> None:
    source = tmp_path / "float"
    AutoModelForCausalLM.from_pretrained(float_checkpoint("llama")).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    match = r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"
    refused(CheckpointError, match, tmp_path, source, preset("w8a8", "rtn"))


def test_a_truncated_source_is_one_error(float_checkpoint, tmp_path) -> None:
    source = tmp_path / "float"
    AutoModelForCausalLM.from_pretrained(float_checkpoint("llama")).save_pretrained(source)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused(CheckpointError, "not a readable", tmp_path, source, preset("w8a8", "rtn"))


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "/no/such/dir"])
def test_a_model_that_does_not_exist_is_one_error(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(CheckpointError, name, tmp_path, name, preset("w8a8", "rtn"))
