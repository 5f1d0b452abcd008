"""Features of images and videos that a decoder adds to the residual stream between its blocks.

Qwen3-VL calls this DeepStack: features of several depths of the vision tower are added at the
positions of image tokens, each after another block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_PREFIX = "deepstack"  # of the arguments of transformers' decoders that hold such features


def adds_features(decoder: nn.Module) -> bool:
    """Whether a decoder adds features to the residual stream between its blocks."""
    return any(name.startswith(_PREFIX) for name in inspect.signature(decoder.forward).parameters)


def rotate_added(arguments: dict[str, Any], rotate: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A decoder's arguments, with the features rotated that it adds between its blocks.

    Args:
        arguments: of its forward, by name. Features are a list, whose n-th member is added behind
            block n; or a dict, whose member n is added before block n.
        rotate: rotates float (..., hidden_size).
    """

    def rotated(features: Any) -> Any:
        if isinstance(features, dict):  # what is added before the first block enters it
            return {n: rotate(member) if n else member for n, member in features.items()}
        if isinstance(features, list | tuple):
            return [rotate(member) for member in features]
        return features

    return {
        name: rotated(value) if name.startswith(_PREFIX) else value
        for name, value in arguments.items()
    }
