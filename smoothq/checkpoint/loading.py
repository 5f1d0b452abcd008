"""Models loaded whole, by transformers, as the class that their config stands for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..compat import with_generation
from ..runtime.process import build_lock, default_modes
from .model_class import class_of
from .model_config import config_in


def load_as_stored(
    directory: Path, name: str, dtype: torch.dtype | str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model, float or quantized, loaded by transformers as the class that its config stands for.

    Args:
        directory: of the model.
        name: of the model, for messages.
        dtype: of all that is not quantized; `auto` is the one that its config names.
        trust_remote_code: whether to run code beside the model.

    Raises:
        SmoothqError: for a config that cannot be read, or that stands for no class.
    """
    config = config_in(directory, name, trust_remote_code)
    kind = with_generation(class_of(config))
    with build_lock, default_modes():
        model: PreTrainedModel = kind.from_pretrained(directory, config=config, dtype=dtype)
    return model
