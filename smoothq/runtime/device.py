"""The device that work runs on."""

from __future__ import annotations

import torch

from ..errors import DeviceError
from ..kernels import runs_on


def resolve_device(device: str) -> str:
    """The device that `auto` means here: a GPU where PyTorch sees one, else the CPU.

    Raises DeviceError if the kernels do not run on the device, or it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def check_device(device: str) -> None:
    """Raise DeviceError if the kernels do not run on that device, or it is not there."""
    kind = device.partition(":")[0]
    if not runs_on(kind):
        raise DeviceError(f"smoothq has no kernels for device '{device}'; use --device cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"PyTorch sees no GPU here for device '{device}'; use --device cpu")
