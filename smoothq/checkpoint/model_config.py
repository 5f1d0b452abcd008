"""The config of a model: reading it, and refusing one that is damaged."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..errors import CheckpointError, UnsupportedModelError, first_line
from .hub_files import resolve_directory
from .model_class import OWN_CODE, trust_code
from .side_files import CONFIG

ADAPTER = "adapter_config.json"
MODELOPT = "hf_quant_config.json"
LARGEST_SIZE = 1 << 28  # integers in a config above this are taken for damage


def read_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id or a local directory; no weights are downloaded.

    Args:
        model: hub id or directory.
        trust_remote_code: as for `config_in`.

    Raises:
        SmoothqError: if there is no config, or it cannot be read.
    """
    return config_in(resolve_directory(model, weights=False), model, trust_remote_code)


def config_named(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id, a local directory, a config file, or of a model type's default sizes.

    Args:
        model: any of these; a directory goes before a model type of its name.
        trust_remote_code: as for `config_in`.

    Raises:
        SmoothqError: if there is no config, or it cannot be read.
    """
    path = Path(model)
    if path.is_file():
        if path.name != CONFIG:
            raise CheckpointError(f"{model}: a config file is called {CONFIG}")
        return config_in(path.parent, model, trust_remote_code)
    if not path.exists() and model in CONFIG_MAPPING:
        return AutoConfig.for_model(model)
    return read_config(model, trust_remote_code)


def config_in(directory: Path, name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a local directory.

    Args:
        directory: of the model.
        name: of the model, for messages.
        trust_remote_code: whether to run code beside the model. Without it nothing asks the user.

    Raises:
        CheckpointError: for a directory without a config, or with an adapter alone.
        UnsupportedModelError: for a config that transformers cannot read.
    """
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{name} holds an adapter, not a whole model; merge it and quantize that: "
            f"from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained("
            f"'{directory}', dtype='auto').merge_and_unload().save_pretrained('MERGED')"
        )
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{name}: no config.json in {directory}; is it a model directory?")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        if trust_remote_code:
            trust_code(config, directory)
    except Exception as error:  # transformers has no common base for damaged files
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UnsupportedModelError(f"{name} {OWN_CODE}") from error
        raise UnsupportedModelError(
            f"{name}: its config cannot be read: {first_line(error)}"
        ) from error
    if not hasattr(config, "quantization_config") and (directory / MODELOPT).is_file():
        quantization = _modelopt_config(directory, name)
        if quantization.get("quant_algo") is not None:
            config.quantization_config = {"quant_method": "modelopt", **quantization}
    return config


def _modelopt_config(directory: Path, name: str) -> dict[str, Any]:
    """What ModelOpt says of a model in a file of its own; empty if nothing."""
    try:
        return dict(json.loads((directory / MODELOPT).read_bytes()).get("quantization") or {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{name}: {MODELOPT} cannot be read: {first_line(error)}"
        ) from error


def already_quantized(name: str, by: str) -> UnsupportedModelError:
    """The error for a model that is quantized.

    Args:
        name: of the model.
        by: what says so.
    """
    return UnsupportedModelError(f"{name} is already quantized ({by}); quantize the float model")


def check_sizes(config: PretrainedConfig, tensors: Collection[str], name: str) -> None:
    """Refuse a damaged config, which would make transformers build until memory is exhausted.

    Args:
        config: of the model.
        tensors: names of the stored tensors; a model has at most as many layers.
        name: of the model, for messages.

    Raises:
        UnsupportedModelError: for an integer above `LARGEST_SIZE` or an impossible layer count.
    """
    text = config.get_text_config(decoder=True)
    for field, value in (config.to_dict() | text.to_dict()).items():
        if isinstance(value, int) and abs(value) > LARGEST_SIZE:
            raise UnsupportedModelError(f"{name}: its config says {field} = {value}")
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None:
        raise UnsupportedModelError(
            f"{name}: '{config.model_type}' has no number of layers (num_hidden_layers) in its "
            "config: models of several stacks cannot be quantized"
        )
    if not isinstance(layers, int) or not 0 < layers <= len(tensors):
        raise UnsupportedModelError(
            f"{name}: its config says {layers} layers, with {len(tensors)} tensors stored"
        )


def dtype_named_by(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a config names, or float32 if it names none.

    Raises:
        UnsupportedModelError: for a dtype that is no float.
    """
    named = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnsupportedModelError(f"{config.model_type}: its config says dtype = {named}")
    return dtype
