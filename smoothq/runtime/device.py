"""The device that work runs on."""

from __future__ import annotations

import torch

from ..errors import DeviceError
from ..kernels import runs_on


def check_device(device: str) -> None:
    """Raise DeviceError if the kernels do not run on that device, or it is not there."""
    kind = device.partition(":")[0]
    if not runs_on(kind):
        raise DeviceError(f"smoothq has no kernels for device '{device}'; use --device cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"PyTorch sees no GPU here for device '{device}'; use --device cpu")
