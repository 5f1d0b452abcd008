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
from .launch import check_float, launch_by_row, on_its_device, row_warps, rows_of

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


def fake_quantized(x: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    """What `torch.compile` sees of a quantizer of whole tokens, whatever its settings."""
    return empty_quantized(x)


@torch.library.custom_op("smoothq::triton_quantize_per_token", mutates_args=())
@on_its_device
def _per_token(x: Tensor, bits: int, clip: float, full_range: bool) -> tuple[Tensor, Tensor]:
    check_float(x, "quantize_per_token")
    rows, (codes, scale) = rows_of(x), empty_quantized(x)
    form = (rows.shape[1], clip, highest_code(bits), full_range)
    launch_by_row(_per_token_kernel, rows, codes, scale, *form)
    return codes, scale


@torch.library.custom_op("smoothq::triton_quantize_token_groups", mutates_args=())
@on_its_device
def _token_groups(x: Tensor, bits: int, group_size: int, clip: float) -> tuple[Tensor, Tensor]:
    check_float(x, "quantize_token_groups")
    rows, (codes, scale) = rows_of(x), empty_quantized(x)
    tokens, width = rows.shape
    if tokens:
        tile = [triton.next_power_of_2(n) for n in (width // group_size, group_size)]
        form = (width, clip, group_size, highest_code(bits), largest_group_multiplier(bits), *tile)
        warps = row_warps(tile[0] * tile[1])
        _token_groups_kernel[(tokens,)](rows, codes, scale, *form, num_warps=warps)
    return codes, scale


@torch.library.custom_op("smoothq::triton_quantize_smoothed", mutates_args=())
@on_its_device
def _smoothed(x: Tensor, multiplier: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    check_float(x, "quantize_smoothed")
    rows, (codes, scale) = rows_of(x), empty_quantized(x)
    multiplier = rows_of(multiplier)
    tokens_a_sequence = rows.shape[0] // max(multiplier.shape[0], 1)
    form = (rows.shape[1], tokens_a_sequence, clip, highest_code(bits))
    launch_by_row(_smoothed_kernel, rows, multiplier, codes, scale, *form)
    return codes, scale


@torch.library.custom_op("smoothq::triton_quantize_one_scale", mutates_args=())
@on_its_device
def _one_scale(
    x: Tensor, source: Tensor, from_maximum: bool, bits: int, clip: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty([1] * x.dim(), dtype=torch.float32, device=x.device)
    programs = max(triton.cdiv(x.numel(), STATIC_BLOCK), 1)
    form = (x.numel(), clip, from_maximum, highest_code(bits), STATIC_BLOCK)
    _one_scale_kernel[(programs,)](x, source.float(), codes, scale, *form, num_warps=4)
    return codes, scale


@torch.library.custom_op("smoothq::triton_channel_multipliers", mutates_args=())
@on_its_device
def channel_multipliers(scale: Tensor, bits: int) -> Tensor:
    """As `reference.channel_multipliers`."""
    rows = rows_of(scale)
    multiplier = torch.empty(scale.shape, dtype=torch.int8, device=scale.device)
    form = (rows.shape[1], SMALLEST_SCALE, largest_multiplier(bits))
    launch_by_row(_multipliers_kernel, rows, multiplier, *form)
    return multiplier


for _operator in (_per_token, _token_groups, _smoothed):
    _operator.register_fake(fake_quantized)


_one_scale.register_fake(
    lambda x, *_: (empty_quantized(x)[0], x.new_empty([1] * x.dim(), dtype=torch.float32))
)
channel_multipliers.register_fake(lambda scale, _: scale.new_empty(scale.shape, dtype=torch.int8))


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
    return QuantizedInput(*_one_scale(x, x.abs().amax(), True, bits, clip))


def static_quantize(x: Tensor, scale: Tensor, bits: int) -> QuantizedInput:
    """As `reference.static_quantize`."""
    check_float(x, "static_quantize")
    return QuantizedInput(*_one_scale(x, scale, False, bits, 1.0))
