"""Weights that `torch.save` wrote (`pytorch_model*.bin`): mapped, with `weights_only=True`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line


def is_bin(path: Path) -> bool:
    """Whether a weight file is one of `torch.save`'s, by its suffix `.bin`."""
    return path.suffix == ".bin"


def open_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; the file stays mapped while they live.

    Raises:
        CheckpointError: for a file that cannot be mapped or holds anything but tensors by name; the
            message says how to convert it.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch each raise their own
        raise CheckpointError(
            f"{path} cannot be mapped ({first_line(error)}){_advice(path)}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise CheckpointError(f"{path} holds more than tensors by name{_advice(path)}")
    return tensors


def _advice(path: Path) -> str:
    return (
        "; if transformers loads it, convert it: from transformers import AutoModelForCausalLM, "
        f"AutoTokenizer; AutoModelForCausalLM.from_pretrained('{path.parent}', dtype='auto')"
        f".save_pretrained('CONVERTED'); AutoTokenizer.from_pretrained('{path.parent}')"
        ".save_pretrained('CONVERTED')"
    )
