"""Models loaded whole as the class that their config stands for, by transformers where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..compat import with_generation
from ..runtime.process import build_lock, default_modes
from .checkpoint_source import CheckpointSource
from .formats.choose import FORMATS, method_of
from .formats.compressed_tensors import METHOD as COMPRESSED_TENSORS
from .model_class import class_of
from .model_config import config_in
from .side_files import GENERATION_CONFIG
from .skeleton import take_dtypes
from .source import load_module


def load_as_stored(
    directory: Path, name: str, dtype: torch.dtype | str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model, float or quantized, loaded as the class that its config stands for.

    Transformers loads it, with smoothq's quantization, or compressed-tensors' of weights and
    inputs, as it runs. Of a model that is quantized in another of `FORMATS`, for which transformers
    needs another package or a GPU, it is the float model of the decoded weights.

    Args:
        directory: of the model.
        name: of the model, for messages.
        dtype: of all that is not quantized; `auto` is the one that its config names.
        trust_remote_code: whether to run code beside the model.

    Raises:
        SmoothqError: for a config that cannot be read, or that stands for no class.
    """
    config = config_in(directory, name, trust_remote_code)
    if method_of(config) in FORMATS.keys() - {COMPRESSED_TENSORS}:
        return _decoded(directory, name, dtype, trust_remote_code)
    kind = with_generation(class_of(config))
    with build_lock, default_modes():
        model: PreTrainedModel = kind.from_pretrained(directory, config=config, dtype=dtype)
    return model


def _decoded(
    directory: Path, name: str, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    """The float model of decoded weights; as `load_as_stored`."""
    source = CheckpointSource(directory, name, trust_remote_code, decodes=True)
    model = source.skeleton()
    load_module(model, "", source, None if isinstance(dtype, str) else dtype)
    take_dtypes(model, {})  # which ties again what is tied
    if (directory / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model
