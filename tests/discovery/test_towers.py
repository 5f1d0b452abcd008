"""Discovery of a text model's wiring in a model with towers, however large these are."""

import copy

import pytest
from transformers import Qwen2_5_VLConfig

from smoothq.discovery.infer import TOKENS, discover_family, example
from smoothq.discovery.weight_watch import read_weights
from tests.tiny_classes import CLASSES


def with_a_large_tower() -> Qwen2_5_VLConfig:
    config = copy.deepcopy(CLASSES["qwen2_5_vl"]().config)
    config.vision_config.depth, config.vision_config.hidden_size = 32, 1280
    config.vision_config.intermediate_size, config.vision_config.out_hidden_size = 3420, 3584
    return config


def test_a_large_tower_does_not_hinder_the_experiments() -> None:
    small = CLASSES["qwen2_5_vl"]().config
    assert discover_family(with_a_large_tower())[1] == discover_family(small)[1]


def test_the_tiny_model_of_a_large_tower_holds_the_text_model_alone() -> None:
    model = example(with_a_large_tower(), [0, 0])
    on_meta = {name: parameter.is_meta for name, parameter in model.named_parameters()}
    assert all((".visual." in f".{name}") == meta for name, meta in on_meta.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight  # as its config ties them
    assert read_weights(model, TOKENS) == frozenset()


@pytest.mark.parametrize(
    ("sections", "scaled"), [([16, 24, 24], [2, 3, 3]), ([24, 20, 20], [3, 2, 3])]
)
def test_rotary_sections_shrink_with_the_heads(sections, scaled) -> None:
    config = with_a_large_tower()
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 768, 6, 2
    text.rope_parameters = text.rope_parameters | {"mrope_section": sections}
    model = example(config, [0, 0])
    assert model.config.text_config.rope_parameters["mrope_section"] == scaled
