"""Modules that accelerate offloads: its hooks bring their tensors before each forward.

Between two forwards these are on the meta device. Hooks set a module's parameters and buffers one
by one, past `nn.Module._apply`; they know of no other attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn


def align_hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of a module, `AlignDevicesHook` or others; none where it has none."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of the module itself brings its tensors for each forward."""
    return any(getattr(hook, "offload", False) for hook in align_hooks(module))


def running_device(module: nn.Module) -> torch.device:
    """The device of a module's first tensor, or the one that accelerate brings it to.

    Raises:
        ValueError: the module has no tensor.
    """
    for part in module.modules():
        tensors = chain(part.parameters(recurse=False), part.buffers(recurse=False))
        for tensor in tensors:
            targets = [getattr(hook, "execution_device", None) for hook in align_hooks(part)]
            brought = [target for target in targets if target is not None]
            return torch.device(brought[-1]) if tensor.is_meta and brought else tensor.device
    raise ValueError(f"{type(module).__name__} has no tensor, and so no device")
