"""A rotated model is the same model with images, also where their features are added on the way."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smoothq.architectures.added_features import adds_features, rotate_added
from smoothq.architectures.graph import takes_rotation
from smoothq.discovery import equivalence
from smoothq.discovery.infer import discover_family
from smoothq.modules.online_rotation import RotatedFeatures, stop_rotating
from tests.tiny_classes import IMAGE, tiny_class


def tiny_model() -> PreTrainedModel:
    """A Qwen3-VL in float64 whose vision tower hands on the features of its first block."""
    return tiny_class("qwen3_vl").double().eval()


def with_image(model: PreTrainedModel, seed: int) -> Tensor:
    """Logits of a prompt with an image of 4 × 4 patches."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(80, (1, 12), generator=generator)
    tokens[0, 3:7] = IMAGE
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == IMAGE).long(),
    }
    with torch.no_grad(), equivalence.InFloat64():
        logits: Tensor = model(**inputs).logits
    return logits


@pytest.mark.slow
def test_a_rotated_stream_leaves_the_logits_of_images() -> None:
    model = tiny_model()
    before, other = with_image(model, 1), with_image(model, 2)
    assert equivalence.deviation(other, before) > 1e-3
    family, _ = discover_family(model.config)
    equivalence.open_blocks(model, family)
    assert takes_rotation(graph for _, graph in equivalence.graphs(model, family))
    equivalence.rotate_stream(model, family)
    assert equivalence.deviation(with_image(model, 1), before) < 1e-9
    twin = copy.deepcopy(model)
    assert equivalence.deviation(with_image(twin, 1), before) < 1e-9
    for hooked in model.modules():
        hooked._forward_pre_hooks = type(hooked._forward_pre_hooks)(
            (key, hook)
            for key, hook in hooked._forward_pre_hooks.items()
            if not isinstance(hook, RotatedFeatures)
        )
    assert equivalence.deviation(with_image(model, 1), before) > 1e-6


@pytest.mark.slow
def test_what_stops_rotating_has_no_hook() -> None:
    model = tiny_model()
    family, _ = discover_family(model.config)
    equivalence.open_blocks(model, family)
    equivalence.rotate_stream(model, family)
    stop_rotating(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@pytest.mark.slow
def test_such_a_rotation_is_folded_into_no_embedding() -> None:
    family, _ = discover_family(tiny_model().config)
    assert not family.sums_at_entry


def test_features_before_the_first_block_enter_it_as_they_are() -> None:
    def negate(x: Tensor) -> Tensor:
        return -x

    one = torch.ones(2)
    given = {"deepstack_features": {0: one, 4: one}, "hidden_states": one, "deepstack_x": None}
    rotated = rotate_added(given, negate)
    assert torch.equal(rotated["deepstack_features"][0], one)
    assert torch.equal(rotated["deepstack_features"][4], -one)
    assert rotated["hidden_states"] is one
    assert rotated["deepstack_x"] is None
    behind = rotate_added({"deepstack_visual_embeds": [one, one]}, negate)
    assert all(torch.equal(member, -one) for member in behind["deepstack_visual_embeds"])


def test_a_decoder_says_whether_it_adds_features() -> None:
    model = tiny_model()
    assert adds_features(model.get_decoder())
    assert not adds_features(model.get_decoder().layers[0])
