"""Tiny configs have the wiring of the real one: what a field's name says is made small."""

import pytest
from transformers import AutoConfig

from smoothq.discovery.shrink import HEAD_DIM, HIDDEN, tiny_configs


def test_layers_are_counted_by_whichever_field_holds_their_number() -> None:
    real = AutoConfig.for_model("longcat_flash")  # two attentions in each of its layers
    assert (real.num_layers, real.num_hidden_layers) == (28, 56)
    tiny = next(tiny_configs(real, 2))
    assert tiny.num_layers == 2
    assert tiny.qk_head_dim == tiny.qk_nope_head_dim + tiny.qk_rope_head_dim == 2 * HEAD_DIM


def test_a_token_passes_experts_also_where_the_class_does_not_say_how_many() -> None:
    real = AutoConfig.for_model("deepseek_v2")
    assert real.num_experts_per_tok is None
    assert next(tiny_configs(real, 2)).num_experts_per_tok == 2


def test_towers_are_the_real_ones_unless_asked() -> None:
    real = AutoConfig.for_model("llava")
    decoder_alone = next(tiny_configs(real, 2))
    assert decoder_alone.text_config.hidden_size == HIDDEN
    assert decoder_alone.vision_config.to_dict() == real.vision_config.to_dict()
    whole = next(tiny_configs(real, 2, towers=True))
    assert whole.vision_config.num_hidden_layers == 2
    assert whole.vision_config.hidden_size == 32
    assert whole.text_config.to_dict() == decoder_alone.text_config.to_dict()


def test_values_by_layer_are_those_of_the_layers_that_are_left(tmp_path) -> None:
    real = AutoConfig.for_model("gemma4").get_text_config()
    tiny = next(tiny_configs(real, 6))
    dims = [layer.head_dim for layer in tiny.per_layer_config]
    assert len(dims) == 6
    assert dims[5] != dims[0]
    tiny.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 6


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_sections_that_only_the_models_code_has_fit_small_heads(name: str) -> None:
    tiny = next(iter(tiny_configs(AutoConfig.for_model(name), 2))).get_text_config(decoder=True)
    dim = tiny.hidden_size // tiny.num_attention_heads
    turned = dim * tiny.rope_parameters.get("partial_rotary_factor", 1.0)
    assert 2 * sum(tiny.rope_parameters["mrope_section"]) == turned
