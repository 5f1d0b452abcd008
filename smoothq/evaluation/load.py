"""Loads a checkpoint as a model that runs, with its tokenizer."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.hub_files import resolve_directory
from ..checkpoint.loading import load_as_stored
from ..checkpoint.model_config import read_config
from ..data.tokenizer import load_tokenizer
from ..errors import CheckpointError, SmoothqError, first_line
from ..modules.prepare import keep_packed
from ..runtime.device import resolve_device
from .divergence import check_vocabularies


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    memory: str = "fast",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a float or quantized model and its tokenizer, from a directory or the hub.

    Args:
        model: a directory or a hub id.
        dtype: of all that is not quantized, by its name in torch; `auto` is the checkpoint's
            dtype, and float32 on a CPU.
        device: where the model runs, such as `cpu` or `cuda`; `auto` is a GPU where there is one.
        memory: `fast` keeps 4-bit weights also unpacked to int8 where kernels are faster that
            way, `low` keeps only the packed weights.
        trust_remote_code: whether to run code beside the model.

    Raises:
        CheckpointError: the model cannot be loaded.
        DeviceError: the device is not available.
    """
    device = resolve_device(device)
    directory = resolve_directory(model)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32  # many CPUs have no bfloat16 products, and emulate them slowly
    try:
        loaded: Any = load_as_stored(directory, model, wanted, trust_remote_code)
    except SmoothqError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged file
        raise CheckpointError(
            f"{model}: transformers cannot load it: {first_line(error)}"
        ) from error
    tokenizer = load_tokenizer(directory, model, trust_remote_code=trust_remote_code)
    if memory == "low":
        keep_packed(loaded)
    return loaded.to(device), tokenizer


def check_stored_vocabularies(
    reference: str, *models: str, trust_remote_code: bool = False
) -> None:
    """Check that models have the reference's vocabulary size, reading only their configs.

    Args:
        reference: a directory or a hub id.
        models: directories or hub ids.
        trust_remote_code: whether to run code beside the models.

    Raises:
        CalibrationError: a model has another vocabulary size than the reference.
    """
    configs = {name: read_config(name, trust_remote_code) for name in (reference, *models)}
    check_vocabularies(
        {name: config.get_text_config(decoder=True).vocab_size for name, config in configs.items()}
    )
