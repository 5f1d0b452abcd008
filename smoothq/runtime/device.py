"""Check of the device that a run is asked to use."""

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
    """Refuse a device that smoothq has no kernels for, or that PyTorch does not see.

    Args:
        device: a PyTorch device string, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        DeviceError: naming what to use instead.
    """
    kind = device.partition(":")[0]
    if not runs_on(kind):
        raise DeviceError(f"smoothq has no kernels for device '{device}'; use 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"PyTorch sees no GPU here for device '{device}'; use 'cpu'")
