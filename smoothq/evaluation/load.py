"""A checkpoint → a model that runs, with its tokenizer."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.source import read_config, resolve_directory
from ..data.tokenizer import load_tokenizer
from ..errors import CheckpointError, SmoothqError, first_line
from ..modules.prepare import keep_packed
from ..runtime.device import check_device
from ..runtime.process import build_lock
from .divergence import check_vocabularies


def load_model(
    model: str, dtype: str = "auto", device: str = "cpu", memory: str = "fast"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float or quantized causal LM and its tokenizer, from a directory or the hub.

    dtype: of all that is not quantized, by its name in torch; auto is the model's own, and float32
    on a CPU. memory: fast holds 4-bit weights also as int8 where that is faster, low packed alone.
    Raises CheckpointError for a model that cannot be loaded, DeviceError for the device.
    """
    check_device(device)
    directory = resolve_directory(model)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32  # many CPUs have no bfloat16 products, and emulate them slowly
    try:
        with build_lock:
            loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted)
    except SmoothqError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged file
        raise CheckpointError(
            f"{model}: transformers cannot load it: {first_line(error)}"
        ) from error
    tokenizer = load_tokenizer(directory, model)
    if memory == "low":
        keep_packed(loaded)
    return loaded.to(device), tokenizer


def check_stored_vocabularies(reference: str, *models: str) -> None:
    """Raise CalibrationError where a model predicts another number of tokens than the reference.

    Only their configs are read.
    """
    configs = {name: read_config(name) for name in (reference, *models)}
    check_vocabularies(
        {name: config.get_text_config(decoder=True).vocab_size for name, config in configs.items()}
    )
