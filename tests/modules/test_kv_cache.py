"""The quantized KV cache and int8 attention: the same tokens whichever way they are reached."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicIndexedLayer

from smoothq import (
    Recipe,
    kernels,
    preset,
    quantize,
)
from smoothq.errors import RecipeError, SmoothqError, UnsupportedModelError
from smoothq.kernels import reference
from smoothq.modules import (
    AttentionSpec,
    CacheFormat,
    QuantizesAttention,
    quantize_attention,
)
from smoothq.modules.kv_cache import QuantizedLayer
from smoothq.plan.resolve import make_plan
from smoothq.recipe.recipe import recipe_from_dict
from smoothq.transforms.hadamard import Hadamard
from tests.tiny_models import VOCABULARY, tiny_model

KEY_VALUE_HEADS, HEAD_DIM, LAYERS = 2, 16, 3  # of every tiny model
SPECS = {
    "kv8": AttentionSpec(CacheFormat(8)),
    "kv4": AttentionSpec(CacheFormat(4), rotation=Hadamard.of(HEAD_DIM, 0)),
    "kv4, groups, first tokens": AttentionSpec(CacheFormat(4, 8, float_tokens=3)),
    "int8": AttentionSpec(product="int8"),
    "int8 over kv8": AttentionSpec(CacheFormat(8), "int8", Hadamard.of(HEAD_DIM, 0)),
}
CACHED = [name for name, spec in SPECS.items() if spec.cache is not None]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
TOKENS = torch.randint(2, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(4))

each_spec = pytest.mark.parametrize("name", SPECS)
# Full attention; a sliding window of 8, which 14 tokens leave behind; fused qkv.
each_kind = pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3"])


def attending(architecture: str, spec: AttentionSpec) -> PreTrainedModel:
    """A tiny model that is float64 but for what its attention quantizes."""
    model = tiny_model(architecture)
    quantize_attention([layer.self_attn for layer in model.model.layers], spec, model.config)
    return model


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in float64: float32's rounding would move a code now and then."""
    for operator in (reference.cached_attention, reference.int8_attention):
        monkeypatch.setattr(kernels.cpu, operator.__name__, operator)


@pytest.mark.usefixtures("exact_products")
class TestAnyWay:
    """Prefill, decoding, batches and caches of every kind give the logits of one whole forward."""

    @each_spec
    @each_kind
    def test_without_a_cache_tokens_are_quantized_all_the_same(self, name, architecture) -> None:
        model = attending(architecture, SPECS[name])
        alone = logits(model, use_cache=False)
        assert close(logits(model), alone)
        error = alone - logits(tiny_model(architecture))
        assert 1e-4 < error.norm() / alone.norm() < (0.15 if "kv4" in name else 0.02)

    @each_spec
    @each_kind
    def test_token_by_token(self, name, architecture) -> None:
        model = attending(architecture, SPECS[name])
        cache = DynamicCache(config=model.config)
        steps = [logits(model, part, cache=cache) for part in TOKENS.split([3, *[1] * 11], 1)]
        assert close(torch.cat(steps, 1), logits(model, use_cache=False))

    @each_spec
    @each_kind
    def test_preallocated(self, name, architecture) -> None:
        model = attending(architecture, SPECS[name])
        cache = StaticCache(config=model.config, max_cache_len=17)
        steps = [logits(model, part, cache=cache) for part in TOKENS.split([9, *[1] * 5], 1)]
        assert close(torch.cat(steps, 1), logits(model, use_cache=False))
        expected = model.generate(TOKENS, **GREEDY)
        assert torch.equal(
            model.generate(TOKENS, cache_implementation="static", **GREEDY), expected
        )

    @each_spec
    @each_kind
    def test_padded_on_the_left(self, name, architecture) -> None:
        model = attending(architecture, SPECS[name])
        mask = torch.ones_like(TOKENS)
        mask[1, :5] = 0
        both = model.generate(TOKENS, attention_mask=mask, **GREEDY)
        for row, start in ((0, 0), (1, 5)):
            alone = model.generate(TOKENS[row : row + 1, start:], **GREEDY)
            assert torch.equal(both[row, start:], alone[0])

    @each_spec
    def test_beams(self, name) -> None:
        model = attending("llama", SPECS[name])
        beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
        expected = model.generate(TOKENS, use_cache=False, **beams)
        assert torch.equal(model.generate(TOKENS, **beams), expected)

    @pytest.mark.parametrize("name", CACHED)
    def test_after_cropping_repeating_and_selecting(self, name) -> None:
        model = attending("llama", SPECS[name])
        cache = DynamicCache(config=model.config)
        whole = logits(model, cache=cache)
        cache.crop(-12)  # back into the first tokens
        assert cache.get_seq_length() == 2
        assert close(logits(model, TOKENS[:, 2:8], cache=cache), whole[:, 2:8])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 1]))
        swapped = logits(model, TOKENS.flip(0)[:, 8:], cache=cache)
        assert close(swapped, whole.flip(0)[:, 8:])
        cache.reset()
        assert close(logits(model, cache=cache), whole)

    @each_spec
    def test_a_block_alone_is_causal(self, name) -> None:
        model = attending("llama", SPECS[name])
        hidden = model.get_input_embeddings()(TOKENS)
        positions = model.model.rotary_emb(hidden, torch.arange(14)[None])
        causal = torch.ones(14, 14, dtype=torch.bool).tril()[None, None]
        alone, masked = (
            model.model.layers[0](hidden, attention_mask=mask, position_embeddings=positions)
            for mask in (None, causal)
        )
        assert torch.equal(alone, masked)

    def test_a_cache_that_makes_its_layers_as_it_goes(self) -> None:
        model = attending("llama", SPECS["kv8"])
        cache = DynamicCache()
        assert close(logits(model, cache=cache), logits(model, use_cache=False))
        assert all(isinstance(layer, QuantizedLayer) for layer in cache.layers)

    @pytest.mark.parametrize("name", ["kv4, groups, first tokens", "int8 over kv8"])
    def test_decoding_over_a_preallocated_cache_is_one_graph(self, name) -> None:
        model = attending("llama", SPECS[name])
        model.model.layers = model.model.layers[:1]  # the compiler takes its time for each
        torch.compiler.reset()
        counted = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model.forward, fullgraph=True, backend=counted)
        cache = StaticCache(config=model.config, max_cache_len=17)
        steps = [logits(model, TOKENS[:, :9], cache=cache)]
        with torch.no_grad():
            steps += [compiled(TOKENS[:, i : i + 1], cache=cache).logits for i in range(9, 14)]
        assert close(torch.cat(steps, 1), logits(model, use_cache=False))
        assert counted.frame_count == 1


class TestBytes:
    @pytest.mark.parametrize(
        ("name", "row"), [("kv8", 16 + 4), ("kv4", 8 + 4), ("kv4, groups, first tokens", 8 + 8)]
    )
    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
    def test_a_cache_takes_its_codes_scales_and_offsets(self, name, row, kind) -> None:
        model, spec = attending("llama", SPECS[name]), SPECS[name]
        static = kind is StaticCache
        cache = kind(config=model.config, **({"max_cache_len": 20} if static else {}))
        logits(model, cache=cache)
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        assert {x.dtype for x in held} == {torch.uint8}
        tokens = 20 if static else TOKENS.shape[1]
        heads = 2 * LAYERS * TOKENS.shape[0] * KEY_VALUE_HEADS
        assert sum(x.untyped_storage().nbytes() for x in held) == heads * tokens * row
        first = sum(x.nbytes for layer in cache.layers for x in layer.first)
        assert first == heads * spec.cache.float_tokens * HEAD_DIM * 8  # the model is float64

    def test_a_sliding_window_holds_the_window(self) -> None:
        model = attending("mistral", SPECS["kv4"])
        cache = DynamicCache(config=model.config)
        logits(model, cache=cache)
        assert cache.layers[0].keys.shape == (2, KEY_VALUE_HEADS, 7, 12)

    def test_a_plan_counts_them(self) -> None:
        model = tiny_model("llama", torch.float32)
        assert make_plan(model, preset("w8a8", "rtn")).bits.cached == 16
        for cache, bits in (({"bits": 8}, 10), ({"bits": 4, "group_size": 4}, 12)):
            plan = make_plan(model, preset("w8a8", "rtn").edit(kv_cache=cache))
            assert plan.bits.cached == bits


@pytest.fixture
def made(float_checkpoint, data, tmp_path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """A quantized model of an architecture and changes to a recipe, and its checkpoint."""

    def of(architecture: str, **fields: object) -> tuple[PreTrainedModel, Path]:
        out, recipe = tmp_path / architecture, preset("w8a8", "rtn").edit(**fields)
        source = float_checkpoint(architecture)
        return quantize(source, recipe, data=data, output=out, overwrite=True).load(), out

    return of


class TestCheckpoint:
    def test_generate_without_arguments_uses_the_recipes_cache(self, made) -> None:
        for architecture in ("llama", "mistral"):
            model, _ = made(architecture, kv_cache={"bits": 4})
            result = model.generate(TOKENS, return_dict_in_generate=True, **GREEDY)
            layers = result.past_key_values.layers
            assert len(layers) == LAYERS
            assert all(isinstance(layer, QuantizedLayer) for layer in layers)
            assert {layer.format for layer in layers} == {CacheFormat(4, None)}
            assert {layer.rotation.rotation for layer in layers} == {Hadamard.of(HEAD_DIM, 0)}

    @pytest.mark.parametrize(
        "fields",
        [{"kv_cache": {"bits": 4, "float_tokens": 2}}, {"kv_cache": {}, "attention": "int8"}],
        ids=str,
    )
    def test_loads_saves_and_copies_to_the_same_logits(self, made, fields, tmp_path) -> None:
        model, out = made("llama", **fields)
        expected = logits(model)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected
        )
        assert torch.equal(logits(copy.deepcopy(model)), expected)

    def test_the_online_rotation_of_keys_is_in_the_config(self, made) -> None:
        model, _ = made("llama", kv_cache={"bits": 4})
        stored = model.config.quantization_config.rotations
        assert [entry["order"] for entry in stored] == [HEAD_DIM]

    def test_dequantizes_to_stock_attention(self, made) -> None:
        model, _ = made("llama", kv_cache={"bits": 8}, attention="int8")
        expected = logits(model)
        dense = model.dequantize()
        assert not any(isinstance(m, QuantizesAttention) for m in dense.modules())
        assert dense.config._attn_implementation == "sdpa"
        assert (logits(dense) - expected).norm() / expected.norm() < 0.05

    def test_a_report_names_the_operators(self, made) -> None:
        attention = lambda model: kernels.report(model).splitlines()[0].split("   ")  # noqa: E731
        model, _ = made("llama", kv_cache={"bits": 4})
        name, count, run, where = (cell.strip() for cell in attention(model) if cell.strip())
        assert (name, count, where) == ("model.layers.*.self_attn", "x3", "cpu on cpu")
        assert run == "hadamard, quantize_heads, cached_attention"
        model, _ = made("llama", attention="int8")
        assert "quantize_heads, quantize_per_token, int8_attention" in "".join(attention(model))


class TestInt8Attention:
    def test_without_what_keys_have_in_common_they_are_rounded_more_finely(self) -> None:
        models = [
            tiny_model("qwen2"),
            *(attending("qwen2", AttentionSpec(product=p)) for p in ("int8", "int8-centred")),
        ]
        for layer in (layer for model in models for layer in model.model.layers):
            # The last pair of a head turns so slowly that all tokens share its large value.
            layer.self_attn.k_proj.bias.data.view(-1, HEAD_DIM)[:, HEAD_DIM // 2 - 1] += 40
        exact, plain, centred = (logits(model) for model in models)
        assert (centred - exact).norm() < 0.3 * (plain - exact).norm()

    def test_the_mean_is_over_tokens_that_are_seen(self) -> None:
        model = attending("llama", AttentionSpec(product="int8-centred"))
        mask = torch.ones_like(TOKENS)
        mask[:, :5] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = logits(model, attention_mask=mask, position_ids=positions)
        assert close(padded[:, 5:], logits(model, TOKENS[:, 5:]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"kv_cache": {"bits": 3}}, "kv_cache.bits"),
            ({"kv_cache": {"float_tokens": -1}}, "float_tokens"),
            ({"kv_cache": {}, "attention": "int8-centred"}, "codes already"),
            ({"kv_cache": {"group_size": 8}, "attention": "int8"}, "one group a head"),
            ({"kv_cache": {"float_tokens": 1}, "attention": "int8"}, "one group a head"),
        ],
        ids=str,
    )
    def test_a_recipe_that_contradicts_itself(self, fields, reason) -> None:
        with pytest.raises(RecipeError, match=reason):
            preset("w8a8").edit(**fields)

    @pytest.mark.parametrize("size", [3, 6, 12, 32, -4])
    def test_groups_that_do_not_fit_a_head(self, size) -> None:
        recipe = preset("w8a8").edit(kv_cache={"group_size": size})
        with pytest.raises(RecipeError, match="divides the 16 numbers of a head"):
            make_plan(tiny_model("llama", torch.float32), recipe)

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"attn_logit_softcapping": 30.0}, "caps its scores"),
            ({"alibi": True}, "ALiBi"),
        ],
        ids=str,
    )
    def test_an_attention_of_another_kind(self, changed, reason) -> None:
        model = tiny_model("llama", torch.float32)
        for name, value in changed.items():
            setattr(model.config, name, value)
        assert make_plan(model, preset("w8a8")).attention is None
        with pytest.raises(UnsupportedModelError, match=reason):
            make_plan(model, preset("w8a8").edit(kv_cache={}))

    def test_arguments_of_another_attention(self) -> None:
        model = attending("llama", SPECS["kv8"])
        with pytest.raises(SmoothqError, match="'softcap'"):
            logits(model, softcap=3.0)

    def test_a_mask_of_floats(self) -> None:
        model = attending("llama", SPECS["kv8"])
        with pytest.raises(SmoothqError, match="mask of booleans"):
            logits(model, attention_mask=torch.zeros(2, 1, 14, 14))

    def test_a_cache_that_another_model_filled(self) -> None:
        cache = DynamicCache()
        logits(tiny_model("llama"), cache=cache)
        with pytest.raises(SmoothqError, match="another model"):
            logits(attending("llama", SPECS["kv8"]), cache=cache)

    def test_a_cache_of_another_kind(self) -> None:
        cache = DynamicCache(config=LlamaConfig(num_hidden_layers=LAYERS))
        cache.layers[0] = DynamicIndexedLayer()
        with pytest.raises(SmoothqError, match="DynamicIndexedLayer cannot hold"):
            logits(attending("llama", SPECS["kv8"]), cache=cache)


class TestRecipe:
    def test_one_without_the_fields_still_reads(self) -> None:
        values = preset("w8a8").model_dump(mode="json")
        del values["kv_cache"], values["attention"]
        assert recipe_from_dict(values) == preset("w8a8")

    @pytest.mark.parametrize(
        ("fields", "cache", "rotated"),
        [
            ({"bits": 8}, CacheFormat(8), False),
            ({"bits": 4}, CacheFormat(4, 32), True),
            ({"bits": 4, "group_size": "head", "rotate_keys": False}, CacheFormat(4), False),
            ({"bits": 8, "group_size": 16, "rotate_keys": True}, CacheFormat(8, 16), True),
        ],
        ids=str,
    )
    def test_what_auto_takes(self, fields, cache, rotated) -> None:
        config = LlamaConfig(
            hidden_size=128, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1
        )
        model = AutoModelForCausalLM.from_config(config)
        attention = make_plan(model, Recipe(kv_cache=fields)).attention
        assert attention == AttentionSpec(cache, "float", Hadamard.of(64, 0) if rotated else None)
        integer = make_plan(model, Recipe(kv_cache={"bits": 4}, attention="int8")).attention
        assert integer.cache == CacheFormat(4)
