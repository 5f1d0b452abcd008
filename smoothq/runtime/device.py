"""The device that a run is asked to use."""

from __future__ import annotations

import torch

from ..errors import DeviceError
from ..kernels import runs_on


def resolve_device(device: str) -> str:
    """The device to run on, which is there and has kernels.

    Args:
        device: a PyTorch device string, such as `cpu`, `cuda` or `cuda:1`; `auto` is a GPU where
            PyTorch sees one, else the CPU.

    Raises:
        DeviceError: smoothq has no kernels for the device, or PyTorch does not see it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if not runs_on(kind):
        raise DeviceError(f"smoothq has no kernels for device '{device}'; use 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"PyTorch sees no GPU here for device '{device}'; use 'cpu'")
    return device
