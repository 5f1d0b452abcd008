"""Every way into a rotated residual stream: what a caller hands over is the float model's.

Token ids, `inputs_embeds`, soft prompts and embeddings mixed by the caller all meet the rotation at
the first block; nothing of it is in the embedding.
"""

import copy
import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CTRLConfig, GotOcr2Config, PreTrainedModel

from smoothq import Recipe, export, quantize
from smoothq.architectures import Family, family_of
from smoothq.architectures.graph import text_config
from smoothq.discovery import equivalence as equivalence
from smoothq.discovery.infer import discover_family, prove_family
from smoothq.errors import CheckpointError
from smoothq.evaluation.divergence import summed_divergence
from smoothq.modules import rotate_ends, rotated_ends
from smoothq.transforms.hadamard import Hadamard
from smoothq.transforms.rotation import rotate_entry
from tests.architectures.test_families import POST_NORMS
from tests.conftest import RECIPES
from tests.tiny_models import TINY, VOCABULARY, tiny_model

ROTATED = [name for name in TINY if name not in POST_NORMS]
TOKENS = torch.randint(0, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(4))
EXACT = equivalence.TOLERANCE[torch.float64]
EIGHT_BITS = RECIPES["w4a4-quarot"].edit(weights__bits=8, activations__bits=8)


def rotated(name: str) -> tuple[PreTrainedModel, Family]:
    """A tiny model in float64 with every transform that its family can take."""
    model, family = tiny_model(name), family_of(TINY[name]())
    equivalence.open_blocks(model, family)
    equivalence.everything(model, family)
    return model, family


@cache
def both(name: str, tied: bool) -> tuple[PreTrainedModel, PreTrainedModel, Family]:
    """A model and its rotated copy, made once, to be left as they are.

    Args:
        name: of their wiring.
        tied: whether head and embedding are one.
    """
    config = TINY[name]()
    config.tie_word_embeddings = tied
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(TINY, name, lambda: copy.deepcopy(config))
        return tiny_model(name), *rotated(name)


def exact(model: PreTrainedModel, **inputs: object) -> object:
    """What a model gives in float64 throughout."""
    with torch.no_grad(), equivalence.InFloat64():
        return model(**inputs)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ROTATED)
class TestInFloat64:
    def test_the_float_models_embeddings_give_the_float_models_logits(self, name, tied) -> None:
        original, model, _ = both(name, tied)
        expected = exact(original, input_ids=TOKENS).logits
        embedded = original.get_input_embeddings()(TOKENS)
        found = exact(model, inputs_embeds=embedded).logits
        assert equivalence.deviation(found, expected) < EXACT

    def test_its_own_embeddings_give_what_the_tokens_give(self, name, tied) -> None:
        _, model, _ = both(name, tied)
        expected = exact(model, input_ids=TOKENS).logits
        found = exact(model, inputs_embeds=model.get_input_embeddings()(TOKENS)).logits
        assert torch.equal(found, expected)

    def test_soft_prompts_before_tokens_give_the_float_models_logits(self, name, tied) -> None:
        original, model, _ = both(name, tied)
        mixed = with_soft_prompt(original)
        expected = exact(original, inputs_embeds=mixed).logits
        found = exact(model, inputs_embeds=with_soft_prompt(model)).logits
        assert equivalence.deviation(found, expected) < EXACT

    def test_the_hidden_states_are_what_the_documentation_says(self, name, tied) -> None:
        original, model, family = both(name, tied)
        asked = {"input_ids": TOKENS, "output_hidden_states": True}
        theirs, ours = (exact(each, **asked).hidden_states for each in (original, model))
        (_, rotation), *ends = rotated_ends(model.get_submodule(family.parts(model).layers)[0])
        assert not ends
        assert torch.equal(ours[0], theirs[0])
        for our, their in zip(ours[1:-1], theirs[1:-1], strict=True):
            assert equivalence.deviation(our, rotation.rotation.apply(their)) < EXACT
        assert equivalence.deviation(ours[-1], theirs[-1]) < EXACT


def with_soft_prompt(model: PreTrainedModel, length: int = 3, seed: int = 0) -> Tensor:
    """Random vectors of the float model's space before embedded tokens: (2, length + 14, K)."""
    embedded = model.get_input_embeddings()(TOKENS)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(2, length, embedded.shape[-1], generator=generator, dtype=torch.float64)
    return torch.cat([prompt.to(embedded.dtype), embedded], 1)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(ROTATED),
    tied=st.booleans(),
    seed=st.integers(0, 1000),
    size=st.floats(1e-3, 1e3),
    length=st.integers(1, 9),
)
@torch.no_grad()
def test_any_vectors_enter_as_in_the_float_model(name, tied, seed, size, length) -> None:
    original, model, _ = both(name, tied)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, length, text_config(original).hidden_size)
    vectors = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    expected, found = (exact(each, inputs_embeds=vectors).logits for each in (original, model))
    assert equivalence.deviation(found, expected) < EXACT


@pytest.fixture(scope="module")
def made(tmp_path_factory, data) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """A tiny model quantized in 8 bits with every rotation, and its directory, made once."""
    found: dict[tuple[str, int], tuple[PreTrainedModel, Path]] = {}

    def of(name: str, recipe: Recipe = EIGHT_BITS) -> tuple[PreTrainedModel, Path]:
        key = (name, recipe.embeddings)
        if key not in found:
            out = tmp_path_factory.mktemp("rotated") / "model"
            source, tokens = tiny_model(name, torch.float32), data.clamp(max=90)
            found[key] = quantize(source, recipe, data=tokens, output=out, check=False).load(), out
        return found[key]

    return of


def divergence(model: PreTrainedModel, inputs: dict[str, Tensor], reference: Tensor) -> float:
    """KL of a model's predictions from reference logits, in nats a token."""
    with torch.no_grad():
        log_q = model(**inputs).logits.flatten(0, 1).log_softmax(-1)
    return summed_divergence(reference.flatten(0, 1).log_softmax(-1), log_q) / len(log_q)


WIRINGS = ["llama", "llama-untied", "gpt2", "bloom", "bloom-untied", "opt", "cohere", "gpt_neox"]
WIRINGS_AND_EMBEDDINGS = [*((name, 16) for name in WIRINGS), ("llama", 8), ("llama-untied", 8)]


@pytest.mark.parametrize(("name", "embeddings"), WIRINGS_AND_EMBEDDINGS)
def test_soft_prompts_cost_a_quantized_model_what_tokens_do(made, name, embeddings) -> None:
    original = tiny_model(name, torch.float32)
    model, _ = made(name, EIGHT_BITS.edit(embeddings=embeddings))
    ways = {"input_ids": TOKENS}, {"inputs_embeds": with_soft_prompt(original)}
    losses = []
    for inputs in ways:
        with torch.no_grad():
            reference = original(**inputs).logits
        losses.append(divergence(model, inputs, reference))
    assert losses[0] < 0.02
    assert losses[1] < 2 * losses[0]
    own = {"inputs_embeds": model.get_input_embeddings()(TOKENS)}
    with torch.no_grad():
        assert torch.equal(model(**own).logits, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2"])
def test_generates_from_embeddings_as_from_tokens(made, name, cache) -> None:
    model, _ = made(name)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    asked["cache_implementation"] = cache
    expected = model.generate(TOKENS, **asked)[:, TOKENS.shape[1] :]
    embedded = tiny_model(name, torch.float32).get_input_embeddings()(TOKENS)
    assert torch.equal(model.generate(inputs_embeds=embedded, **asked), expected)


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "opt", "bloom-untied"])
def test_what_enters_the_stream_lies_in_the_file_as_it_was(made, name) -> None:
    original, (_, out) = tiny_model(name, torch.float32), made(name)
    parts = family_of(original.config).parts(original)
    stored, names = load_file(out / "model.safetensors"), [*parts.entering, parts.entry_norm]
    for key in (f"{each}.weight" for each in names if each is not None):
        assert torch.equal(stored[key], original.get_parameter(key))


@torch.no_grad()
def test_image_features_enter_as_in_the_float_model(monkeypatch, data) -> None:
    vision = {"hidden_size": 16, "output_channels": 32, "num_hidden_layers": 1, "mlp_dim": 32}
    vision |= {"num_attention_heads": 2, "image_size": 64, "window_size": 2}
    vision |= {"global_attn_indexes": [0]}
    text = TINY["qwen2"]().to_dict() | {"model_type": "qwen2"}
    config = GotOcr2Config(text_config=text, vision_config=vision, image_token_index=96)
    monkeypatch.setitem(TINY, "got_ocr2", lambda: config)
    original = tiny_model("got_ocr2", torch.float32)
    model = quantize(original, EIGHT_BITS, data=data.clamp(max=90), check=False)
    generator = torch.Generator().manual_seed(0)
    tokens, images = TOKENS[:1].clamp(max=90), torch.randn(2, 3, 64, 64, generator=generator)
    tokens[0, 4] = 96
    inputs = [{"input_ids": tokens, "pixel_values": image[None]} for image in images]
    first, second = (original(**each).logits for each in inputs)
    assert equivalence.deviation(first, second) > 0.01
    assert divergence(model, inputs[0], first) < 0.02


class TestTheModule:
    """A rotated model is moved, copied, pickled and compiled like any other."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        model = tiny_model("llama", torch.float32)
        parts = family_of(model.config).parts(model)
        rotate_ends(model, parts, Hadamard.of(48, seed=5))
        return model

    @torch.no_grad()
    def test_a_copy_has_rotations_of_its_own(self, model) -> None:
        expected = model(TOKENS).logits
        copied = copy.deepcopy(model)
        for _, rotation in rotated_ends(copied):
            rotation.signs.neg_()
        assert torch.equal(model(TOKENS).logits, expected)
        assert not torch.equal(copied(TOKENS).logits, expected)

    @torch.no_grad()
    def test_it_is_pickled(self, model) -> None:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_it_follows_a_change_of_dtype(self, model, dtype) -> None:
        expected = model(TOKENS).logits
        found = model.to(dtype)(TOKENS).logits
        assert found.dtype == dtype
        assert equivalence.deviation(found.float(), expected) < (
            0.05 if dtype == torch.bfloat16 else 1e-5
        )

    @pytest.mark.slow
    @torch.no_grad()
    def test_it_compiles_whole(self, model) -> None:
        expected = model(inputs_embeds=with_soft_prompt(model), use_cache=False).logits
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        found = compiled(inputs_embeds=with_soft_prompt(model), use_cache=False).logits
        assert equivalence.deviation(found, expected) < 1e-5

    @torch.no_grad()
    def test_hooks_see_what_was_handed_in(self, model) -> None:
        seen: list[Tensor] = []
        embedded = model.get_input_embeddings()(TOKENS)
        model.model.layers[0].register_forward_hook(lambda _, args, output: seen.append(args[0]))
        model(inputs_embeds=embedded)
        assert torch.equal(seen[0], embedded)

    @torch.no_grad()
    def test_accelerate_dispatches_it_and_it_stops_rotating(self, model) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        from smoothq.modules import stop_rotating

        plain, expected = tiny_model("llama", torch.float32), model(TOKENS).logits
        for module in (model.model.layers[0], model.model.norm):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
        assert torch.equal(model(TOKENS).logits, expected)
        stop_rotating(model)
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "bloom-untied"])
def test_dequantizing_gives_the_float_models_space_back(made, name) -> None:
    _, out = made(name)
    model = AutoModelForCausalLM.from_pretrained(out).dequantize()
    original = tiny_model(name, torch.float32)
    asked = {"inputs_embeds": with_soft_prompt(original), "output_hidden_states": True}
    with torch.no_grad():
        theirs, ours = (each(**asked).hidden_states for each in (original, model))
        heads = [
            each.get_output_embeddings()(states[-1])
            for each, states in ((original, theirs), (model, ours))
        ]
    for our, their in zip([*ours[:-1], heads[1]], [*theirs[:-1], heads[0]], strict=True):
        assert (our - their).norm() < 0.05 * their.norm()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@torch.no_grad()
def test_the_entry_rotates_offline_with_its_embeddings(name) -> None:
    model = tiny_model(name)
    parts = family_of(model.config).parts(model)
    rotation = Hadamard.of(text_config(model).hidden_size, seed=3)
    seen: list[Tensor] = []
    model.get_submodule(parts.block_name(0)).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    model(TOKENS)
    rotate_entry(model, parts, rotation)
    model(TOKENS)
    assert equivalence.deviation(seen[1], rotation.apply(seen[0])) < EXACT


def test_positions_that_are_no_parameter_are_rotated_with_the_rest_or_not_at_all() -> None:
    """CTRL adds sinusoids to its embeddings: no rotation of its tensors would rotate them."""
    config = CTRLConfig(vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=2, n_head=2)
    family, _ = discover_family(config)
    assert not family.sums_at_entry
    proven = prove_family(family, config)
    assert proven["stream rotation"] < EXACT
    assert "stream rotation, folded" not in proven


@pytest.fixture
def of_format_2(made, tmp_path) -> Callable[[str], Path]:
    """A checkpoint whose config says that its tensors lie as in format 2."""

    def of(name: str) -> Path:
        _, out = made(name)
        copied = shutil.copytree(out, tmp_path / name)
        config = json.loads((copied / "config.json").read_text())
        assert config["quantization_config"]["format"] == 3
        config["quantization_config"]["format"] = 2
        (copied / "config.json").write_text(json.dumps(config))
        return copied

    return of


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "bloom-untied", "llama", "bloom"])
def test_a_checkpoint_of_format_2_is_read_where_it_rotated_no_embedding(
    made, of_format_2, tmp_path, name
) -> None:
    directory = of_format_2(name)
    if name in ("llama", "bloom", "bloom-untied"):
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS).logits, made(name)[0](TOKENS).logits)
        return
    message = r"format 2 .*format 3; quantize the model again"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(CheckpointError, match=message):
        export(directory, tmp_path / "export")
    assert not (tmp_path / "export").exists()
