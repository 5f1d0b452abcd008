"""What a recipe leaves in float, gives other bits, or stores in 8 bits outside the blocks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothq import preset, quantize
from smoothq.discovery import equivalence as equivalence
from smoothq.errors import RecipeError
from smoothq.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from smoothq.plan.resolve import make_plan
from smoothq.recipe.recipe import (
    Activations,
    Override,
    Weights,
    recipe_from_dict,
)
from tests.conftest import RECIPES
from tests.tiny_models import tiny_model

TOKENS = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(1))


def quantized_names(model: PreTrainedModel) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "w4a4"),
        ("llama", "w8a8-static"),
        ("gpt2", "w4a4"),
        ("falcon-groups", "w8a8-static"),
        ("mixtral", "w8a8"),
        ("mixtral", "w4a4"),
        ("gemma2", "w8a8"),
    ],
)
def test_a_kept_block_stays_float_and_computes_what_it_did(
    name, recipe, float_checkpoint, data, tmp_path
) -> None:
    data, layers = data.clamp(max=90), {"llama": "model.layers", "mixtral": "model.layers"}
    prefix = f"{layers.get(name, 'model.layers' if name == 'gemma2' else 'transformer.h')}.1."
    kept = RECIPES[recipe].edit(keep=(f"{prefix}*",), gptq__least_tokens=8, tuning=None)
    # The last look compares the block that was computed in float with the one that is loaded.
    model = quantize(float_checkpoint(name), kept, data=data, output=tmp_path / "out").load()
    names = quantized_names(model)
    assert names
    assert not [n for n in names if n.startswith(prefix)]
    everything = RECIPES[recipe].edit(
        keep=(f"{prefix.replace('.1.', '.*')}",), gptq__least_tokens=8, tuning=None
    )
    with pytest.raises(RecipeError, match="no linear to quantize"):
        make_plan(tiny_model(name), everything)


def test_all_but_one_linear_kept_leaves_the_function_but_for_its_rounding(
    float_checkpoint, data
) -> None:
    keep = ("*.self_attn.*", "*.mlp.gate_proj", "*.mlp.up_proj", "*.layers.[12].*")
    recipe = preset("w4a8").edit(
        keep=keep, weights__group_size=16, weights__bits=8, weights__group_scale="float"
    )
    model = quantize(float_checkpoint("llama-untied"), recipe, data=data, check=False)
    assert quantized_names(model) == {"model.layers.0.mlp.down_proj"}
    exact = equivalence.logits(tiny_model("llama-untied", torch.float32), TOKENS)
    assert (equivalence.logits(model, TOKENS) - exact).norm() < 0.01 * exact.norm()


def test_kept_linears_count_at_their_float_bits() -> None:
    model = tiny_model("llama", torch.float32)
    whole = make_plan(model, RECIPES["w4a8"]).bits
    kept = make_plan(model, RECIPES["w4a8"].edit(keep=("*.layers.0.*",))).bits
    assert kept.weight == pytest.approx((2 * whole.weight + 32) / 3)
    assert kept.activation == pytest.approx((2 * whole.activation + 16) / 3)


@pytest.mark.parametrize("field", ["keep", "overrides"])
def test_a_pattern_that_matches_nothing_is_refused_with_an_example(field) -> None:
    values = {"keep": ("*.dwon_proj",), "overrides": ({"match": "*.dwon_proj"},)}
    recipe = RECIPES["w8a8"].edit(**{field: values[field]})
    with pytest.raises(RecipeError, match=r"dwon_proj.*called like 'model\.layers\.0\.self_attn"):
        make_plan(tiny_model("llama"), recipe)


class TestOverrides:
    down = Override(
        match="*.down_proj", weights=Weights(bits=8), activations=Activations(bits=8)
    ).model_dump()

    def test_the_first_that_matches_gives_a_linear_its_formats(
        self, float_checkpoint, data, tmp_path
    ) -> None:
        recipe = RECIPES["w4a4"].edit(overrides=(self.down,))
        model = quantize(
            float_checkpoint("llama"), recipe, data=data, output=tmp_path / "out"
        ).load()
        mlp = model.model.layers[0].mlp
        assert mlp.down_proj.spec.grid.bits == 8
        assert mlp.down_proj.site_input.spec.bits == 8
        assert mlp.up_proj.spec.grid.bits == 4
        assert mlp.up_proj.site_input.spec.mode == "smooth_token"
        stored = json.loads((tmp_path / "out" / "config.json").read_text())
        again = recipe_from_dict(stored["quantization_config"]["recipe"])
        assert again == recipe

    def test_bits_are_averaged_over_what_each_linear_has(self) -> None:
        model = tiny_model("llama", torch.float32)
        mixed = make_plan(model, RECIPES["w4a4"].edit(overrides=(self.down,))).bits
        four = make_plan(model, RECIPES["w4a4"]).bits
        assert four.weight < mixed.weight < 8
        assert four.activation < mixed.activation < 8

    def test_readers_of_one_tensor_need_the_same_activations(self) -> None:
        override = Override(match="*.q_proj", activations=Activations(bits=8)).model_dump()
        with pytest.raises(RecipeError, match=r"self_attn\.q_proj and .*k_proj read the same"):
            make_plan(tiny_model("llama"), RECIPES["w4a4"].edit(overrides=(override,)))


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("name", "recipe"),
        [
            ("llama", "w8a8"),
            ("llama", "w4a4"),
            ("llama-untied", "w4a4"),
            ("llama-untied", "w4a16"),
            ("gpt2", "w4a16"),
            ("bloom", "w4a4"),
            ("gpt_neox", "w8a8"),
        ],
    )
    def test_embedding_and_head_in_8_bits_load_save_and_dequantize(
        self, name, recipe, float_checkpoint, data, tmp_path
    ) -> None:
        data, out = data.clamp(max=90), tmp_path / "out"
        plain = quantize(float_checkpoint(name), RECIPES[recipe], data=data, check=False)
        eight = RECIPES[recipe].edit(embeddings=8)
        model = quantize(float_checkpoint(name), eight, data=data, output=out).load()
        assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
        tied = isinstance(model.get_output_embeddings(), TiedHead)
        assert tied == bool(plain.config.tie_word_embeddings)
        logits, expected = equivalence.logits(model, TOKENS), equivalence.logits(plain, TOKENS)
        assert not torch.equal(logits, expected)
        exact = equivalence.logits(tiny_model(name, torch.float32), TOKENS)
        error = (logits - exact).norm() / exact.norm()
        assert error < 0.05 + 1.5 * (expected - exact).norm() / exact.norm()
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(equivalence.logits(again, TOKENS), logits)
        assert again.generate(TOKENS[:1, :4], max_new_tokens=2, pad_token_id=0).shape[1] > 4
        stock = again.dequantize()
        assert type(stock.get_input_embeddings()) is torch.nn.Embedding
        rows = tiny_model(name, torch.float32).get_input_embeddings().weight
        # Half a step, and what the largest of a row loses to its scale's rounding to 8 bits.
        allowed = 0.76 * rows.abs().amax(1, keepdim=True) / 127
        assert ((stock.get_input_embeddings().weight - rows).abs() <= allowed).all()
        same = stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
        assert same == tied
        error = (equivalence.logits(stock, TOKENS) - exact).norm() / exact.norm()
        assert error < 0.05 + 1.5 * (expected - exact).norm() / exact.norm()

    def test_the_bytes_are_those_of_the_codes_and_a_scale_a_row(
        self, float_checkpoint, tmp_path
    ) -> None:
        sizes = {}
        for bits in (16, 8):
            recipe = preset("w8a8", "rtn").edit(embeddings=bits)
            out = tmp_path / str(bits)
            quantize(float_checkpoint("llama"), recipe, output=out, check=False)
            plan = make_plan(tiny_model("llama", torch.float32), recipe)
            sizes[bits] = plan.total_bytes
            file = (out / "model.safetensors").stat().st_size
            assert abs(file - plan.total_bytes) < 20_000
        assert sizes[16] - sizes[8] == 97 * (48 * 4 - 48 - 2)

    @pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens"])
    def test_keep_leaves_them_in_float(self, pattern) -> None:
        recipe = RECIPES["w8a8"].edit(embeddings=8, keep=(pattern,))
        assert make_plan(tiny_model("llama"), recipe).tables == ()

    def test_an_embedding_that_scales_is_refused_by_name(self) -> None:
        with pytest.raises(RecipeError, match="does more than look rows up"):
            make_plan(tiny_model("gemma2"), RECIPES["w8a8"].edit(embeddings=8))
