"""The operators that run a quantized model, dispatched by the device of their input.

Nothing outside this package calls a backend. The products are registered with PyTorch as custom
operators with fake implementations, so that `torch.compile(fullgraph=True)` and `torch.export`
see them whole; the quantizers are plain tensor code that a compiler may fuse. `reference.py`
defines every result.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import cpu
from .reference import QuantizedInput, channel_multipliers, highest_code, largest_multiplier

__all__ = [
    "QuantizedInput",
    "channel_multipliers",
    "group_gemm",
    "hadamard",
    "highest_code",
    "int8_gemm",
    "largest_multiplier",
    "live_channel_maxima",
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


def runs_on(device_type: str) -> bool:
    """Whether the operators run on that kind of device ("cpu", "cuda", …)."""
    return device_type in _BACKENDS


def _backend(x: Tensor) -> ModuleType:
    backend = _BACKENDS.get("cpu" if x.device.type == "meta" else x.device.type)
    if backend is None:
        raise NotImplementedError(
            f"smoothq has no kernels for device '{x.device}'; it runs on: {', '.join(_BACKENDS)}"
        )
    return backend


def quantize_per_token(x: Tensor, bits: int, clip: float = 1.0) -> QuantizedInput:
    """See `reference.quantize_per_token`."""
    return _backend(x).quantize_per_token(x, bits, clip)  # type: ignore[no-any-return]


def quantize_per_tensor(x: Tensor, bits: int, clip: float = 1.0) -> QuantizedInput:
    """See `reference.quantize_per_tensor`."""
    return _backend(x).quantize_per_tensor(x, bits, clip)  # type: ignore[no-any-return]


def static_quantize(x: Tensor, scale: Tensor, bits: int) -> QuantizedInput:
    """See `reference.static_quantize`."""
    return _backend(x).static_quantize(x, scale, bits)  # type: ignore[no-any-return]


def quantize_token_groups(
    x: Tensor, bits: int, group_size: int, clip: float = 1.0
) -> QuantizedInput:
    """See `reference.quantize_token_groups`."""
    return _backend(x).quantize_token_groups(x, bits, group_size, clip)  # type: ignore[no-any-return]


def quantize_smoothed(
    x: Tensor, multiplier: Tensor, bits: int, clip: float = 1.0
) -> QuantizedInput:
    """See `reference.quantize_smoothed`."""
    return _backend(x).quantize_smoothed(x, multiplier, bits, clip)  # type: ignore[no-any-return]


def live_channel_maxima(x: Tensor, mask: Tensor | None, normalise: bool) -> Tensor:
    """See `reference.live_channel_maxima`."""
    return _backend(x).live_channel_maxima(x, mask, normalise)  # type: ignore[no-any-return]


def runtime_smooth_quantize(
    x: Tensor,
    bits: int,
    group_size: int,
    clip: float = 1.0,
    mask: Tensor | None = None,
    normalise: bool = False,
) -> QuantizedInput:
    """See `reference.runtime_smooth_quantize`."""
    backend = _backend(x)
    return backend.runtime_smooth_quantize(  # type: ignore[no-any-return]
        x, bits, group_size, clip, mask, normalise
    )


@torch.library.custom_op("smoothq::int8_gemm", mutates_args=())
def int8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.int8_gemm`."""
    return _backend(codes).int8_gemm(  # type: ignore[no-any-return]
        codes, scale, weight, weight_scale, bias, dtype
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


@torch.library.custom_op("smoothq::group_gemm", mutates_args=())
def group_gemm(
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
    """See `reference.group_gemm`."""
    return _backend(codes).group_gemm(  # type: ignore[no-any-return]
        codes, scale, block_scale, order, weight, weight_scale, bias, group_size, dtype
    )


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


@torch.library.custom_op("smoothq::weight_only_gemm", mutates_args=())
def weight_only_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """See `reference.weight_only_gemm`."""
    return _backend(x).weight_only_gemm(  # type: ignore[no-any-return]
        x, packed, weight_scale, multiplier, bias, bits
    )


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


def hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """See `reference.hadamard`."""
    return _backend(x).hadamard(x, signs, left, right)  # type: ignore[no-any-return]
