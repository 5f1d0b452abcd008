"""The operators that run a quantized model, dispatched by the device of their input.

Nothing outside this package calls a backend. The products are registered with PyTorch as custom
operators with fake implementations, so that `torch.compile(fullgraph=True)` and `torch.export`
see them whole; the quantizers are plain tensor code that a compiler may fuse. `reference.py`
defines every result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from . import cpu, reference
from .reference import QuantizedInput, highest_code, largest_multiplier

__all__ = [
    "QuantizedInput",
    "channel_multipliers",
    "group_gemm",
    "hadamard",
    "highest_code",
    "int8_gemm",
    "largest_multiplier",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_smoothed",
    "quantize_token_groups",
    "runs_on",
    "runtime_smooth_quantize",
    "static_quantize",
    "weight_only_gemm",
]

_BACKENDS: dict[str, ModuleType] = {"cpu": cpu}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def runs_on(device_type: str) -> bool:
    """Whether the operators run on that kind of device ("cpu", "cuda", …)."""
    return device_type in _BACKENDS


def _by_device(definition: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The operator that `definition` specifies: its namesake in the backend of the first tensor.

    Raises NotImplementedError naming a device for which there is none.
    """
    name = definition.__name__

    @functools.wraps(definition)
    def operator(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = cast(Tensor, args[0]).device
        backend = _BACKENDS.get("cpu" if device.type == "meta" else device.type)
        if backend is None:
            raise NotImplementedError(
                f"smoothq has no kernel '{name}' for device '{device}'; "
                f"it runs on: {', '.join(_BACKENDS)}"
            )
        return cast(Result, getattr(backend, name)(*args, **kwargs))

    return operator


channel_multipliers = _by_device(reference.channel_multipliers)
hadamard = _by_device(reference.hadamard)
quantize_per_tensor = _by_device(reference.quantize_per_tensor)
quantize_per_token = _by_device(reference.quantize_per_token)
quantize_smoothed = _by_device(reference.quantize_smoothed)
quantize_token_groups = _by_device(reference.quantize_token_groups)
runtime_smooth_quantize = _by_device(reference.runtime_smooth_quantize)
static_quantize = _by_device(reference.static_quantize)

int8_gemm = torch.library.custom_op(
    "smoothq::int8_gemm", _by_device(reference.int8_gemm), mutates_args=()
)
group_gemm = torch.library.custom_op(
    "smoothq::group_gemm", _by_device(reference.group_gemm), mutates_args=()
)
weight_only_gemm = torch.library.custom_op(
    "smoothq::weight_only_gemm", _by_device(reference.weight_only_gemm), mutates_args=()
)


@int8_gemm.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


@group_gemm.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    order: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1], weight.shape[0], dtype=dtype)


@weight_only_gemm.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])
