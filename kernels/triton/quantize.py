"""The quantizers: one program a token, the whole token in registers, every byte touched once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import (
    SMALLEST_SCALE,
    QuantizedInput,
    highest_code,
    largest_group_multiplier,
    largest_multiplier,
    tensor_scale,
)
from .codes import (
    at_least,
    divide,
    divide_by,
    largest,
    nonzero,
    per_token,
    to_codes,
    to_multipliers,
    token_groups,
)
from .launch import (
    cdiv,
    check_float,
    launch_by_row,
    next_power_of_2,
    registered,
    row_count,
    row_warps,
)

STATIC_BLOCK = 4096  # elements a program of the element-wise quantizer


@triton.jit
def _per_token_kernel(
    x,
    codes,
    scales,
    K,
    clip,
    HIGHEST: tl.constexpr,
    FULL_RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    quantized, scale = per_token(values, clip, HIGHEST, FULL_RANGE)
    tl.store(codes + row * K + columns, quantized, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _token_groups_kernel(
    x,
    codes,
    scales,
    K,
    clip,
    GROUP: tl.constexpr,
    HIGHEST: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, COLUMNS)[None, :]
    columns = tl.arange(0, GROUPS)[:, None] * GROUP + inner
    inside = (inner < GROUP) & (columns < K)
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    quantized, scale = token_groups(values, clip, HIGHEST, LARGEST)
    tl.store(codes + row * K + columns, quantized, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _smoothed_kernel(
    x,
    multiplier,
    codes,
    scales,
    K,
    tokens_a_sequence,
    clip,
    HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    sequence = row // tokens_a_sequence
    m = tl.load(multiplier + sequence * K + columns, mask=inside, other=1)
    quantized, scale = per_token(divide(values, m.to(tl.float32)), clip, HIGHEST, False)
    tl.store(codes + row * K + columns, quantized * m, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _one_scale_kernel(
    x,
    source,
    codes,
    scale_out,
    elements,
    clip,
    FROM_MAXIMUM: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes under one scale: `source` itself, or with FROM_MAXIMUM the one of that maximum."""
    program = tl.program_id(0).to(tl.int64)
    scale = tl.load(source)
    if FROM_MAXIMUM:
        scale = nonzero(divide_by(scale * clip, HIGHEST))
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(codes + offsets, to_codes(divide(values, scale), HIGHEST), mask=inside)
    if program == 0:
        tl.store(scale_out, scale)


@triton.jit
def _multipliers_kernel(scale, multiplier, K, smallest, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    values = tl.load(scale + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    values = at_least(values, smallest)
    base = divide_by(largest(values, None), LARGEST)
    integers = to_multipliers(divide(values, base), LARGEST)
    tl.store(multiplier + row * K + columns, integers.to(tl.int8), mask=inside)


def empty_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (..., K) and scale float32 (..., 1) for x, not yet written."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _empty_one_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `empty_quantized`, with one scale (1, …, 1) for all tokens."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty([1] * x.dim(), dtype=torch.float32, device=x.device)


def fake_quantized(x: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    """What `torch.compile` sees of a quantizer of whole tokens, whatever its settings."""
    return empty_quantized(x)


@registered("quantize_per_token", fake_quantized)
def _per_token(x: Tensor, bits: int, clip: float, full_range: bool) -> tuple[Tensor, Tensor]:
    check_float(x, "quantize_per_token")
    codes, scale = empty_quantized(x)
    form = (x.shape[-1], clip, highest_code(bits), full_range)
    launch_by_row(_per_token_kernel, x.contiguous(), codes, scale, *form)
    return codes, scale


@registered("quantize_token_groups", fake_quantized)
def _token_groups(x: Tensor, bits: int, group_size: int, clip: float) -> tuple[Tensor, Tensor]:
    check_float(x, "quantize_token_groups")
    codes, scale = empty_quantized(x)
    tokens, width = row_count(x), x.shape[-1]
    if tokens:
        tile = [next_power_of_2(n) for n in (width // group_size, group_size)]
        form = (width, clip, group_size, highest_code(bits), largest_group_multiplier(bits), *tile)
        warps = row_warps(tile[0] * tile[1], x.get_device())
        _token_groups_kernel[(tokens,)](x.contiguous(), codes, scale, *form, num_warps=warps)
    return codes, scale


@registered("quantize_smoothed", fake_quantized)
def _smoothed(x: Tensor, multiplier: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    check_float(x, "quantize_smoothed")
    x, multiplier, (codes, scale) = x.contiguous(), multiplier.contiguous(), empty_quantized(x)
    tokens_a_sequence = row_count(x) // max(row_count(multiplier), 1)
    form = (x.shape[-1], tokens_a_sequence, clip, highest_code(bits))
    launch_by_row(_smoothed_kernel, x, multiplier, codes, scale, *form)
    return codes, scale


@registered("quantize_one_scale", lambda x, *settings: _empty_one_scale(x))
def _one_scale(
    x: Tensor, source: Tensor, from_maximum: bool, bits: int, clip: float
) -> tuple[Tensor, Tensor]:
    x, (codes, scale) = x.contiguous(), _empty_one_scale(x)
    programs = max(cdiv(x.numel(), STATIC_BLOCK), 1)
    form = (x.numel(), clip, from_maximum, highest_code(bits), STATIC_BLOCK)
    _one_scale_kernel[(programs,)](x, source.float(), codes, scale, *form, num_warps=4)
    return codes, scale


@registered(
    "channel_multipliers", lambda scale, bits: scale.new_empty(scale.shape, dtype=torch.int8)
)
def channel_multipliers(scale: Tensor, bits: int) -> Tensor:
    """As `reference.channel_multipliers`."""
    multiplier = torch.empty(scale.shape, dtype=torch.int8, device=scale.device)
    form = (scale.shape[-1], SMALLEST_SCALE, largest_multiplier(bits))
    launch_by_row(_multipliers_kernel, scale.contiguous(), multiplier, *form)
    return multiplier


def quantize_per_token(
    x: Tensor, bits: int, clip: float = 1.0, full_range: bool = False
) -> QuantizedInput:
    """As `reference.quantize_per_token`."""
    return QuantizedInput(*_per_token(x, bits, clip, full_range))


def quantize_token_groups(
    x: Tensor, bits: int, group_size: int, clip: float = 1.0
) -> QuantizedInput:
    """As `reference.quantize_token_groups`."""
    return QuantizedInput(*_token_groups(x, bits, group_size, clip))


def quantize_smoothed(
    x: Tensor, multiplier: Tensor, bits: int, clip: float = 1.0
) -> QuantizedInput:
    """As `reference.quantize_smoothed`, for one multiplier a channel, or a sequence and channel."""
    return QuantizedInput(*_smoothed(x, multiplier, bits, clip))


def quantize_per_tensor(x: Tensor, bits: int, clip: float = 1.0) -> QuantizedInput:
    """As `reference.quantize_per_tensor`: PyTorch's maximum, then one pass."""
    check_float(x, "quantize_per_tensor")
    if x.numel() == 0:
        return static_quantize(x, tensor_scale(x, bits, clip), bits)
    return QuantizedInput(*_one_scale(x, x.abs().amax(), True, bits, clip))


def static_quantize(x: Tensor, scale: Tensor, bits: int) -> QuantizedInput:
    """As `reference.static_quantize`."""
    check_float(x, "static_quantize")
    return QuantizedInput(*_one_scale(x, scale, False, bits, 1.0))
