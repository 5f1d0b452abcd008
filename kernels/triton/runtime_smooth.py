"""Runtime smoothing over the sequence at hand, in two passes over the input.

The first pass finds each channel's maximum over the tokens (a program takes some tokens, whole, so
that a token's own maximum is at hand to normalise with), the second gathers the channels in the
order of their maxima, divides and quantizes. Between them the maxima alone are sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import SMALLEST_SCALE, QuantizedInput, highest_code
from .codes import at_least, divide, largest, magnitude_bits, per_token
from .launch import (
    cdiv,
    check_float,
    launch_by_row,
    next_power_of_2,
    registered,
    row_warps,
)
from .quantize import channel_multipliers, empty_quantized, fake_quantized, quantize_smoothed

TOKENS_A_PROGRAM = 16  # of the first pass: so many fewer atomic maxima than tokens


@triton.jit
def _channel_maxima_kernel(
    x,
    mask,
    maxima,
    L,
    K,
    smallest,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TOKENS
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    highest = tl.zeros([BLOCK], tl.int32)  # of the bits, in whose order a NaN is the largest
    for token in range(first, min(first + TOKENS, L)):
        row = sequence * L + token
        kept = True
        if mask is not None:
            kept = tl.load(mask + row) != 0
        values = tl.load(x + row * K + columns, mask=inside & kept, other=0.0).to(tl.float32)
        if NORMALISE:
            values = divide(values, at_least(largest(values, None), smallest))
        highest = tl.maximum(highest, magnitude_bits(values))
    tl.atomic_max(maxima + sequence * K + columns, highest, mask=inside, sem="relaxed")


@triton.jit
def _ordered_kernel(
    x,
    order,
    block_scale,
    codes,
    scales,
    L,
    K,
    clip,
    GROUP: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sequence = row // L
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    channel = tl.load(order + sequence * K + columns, mask=inside, other=0)
    values = tl.load(x + row * K + channel, mask=inside, other=0.0).to(tl.float32)
    divisors = block_scale + sequence * (K // GROUP) + columns // GROUP
    smoothed = divide(values, tl.load(divisors, mask=inside, other=1.0))
    quantized, scale = per_token(smoothed, clip, HIGHEST, False)
    tl.store(codes + row * K + columns, quantized, mask=inside)
    tl.store(scales + row, scale)


@registered(
    "live_channel_maxima",
    lambda x, *settings: x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32),
)
def _channel_maxima(x: Tensor, mask: Tensor | None, normalise: bool) -> Tensor:
    check_float(x, "runtime_smooth_quantize")
    batch, length, width = x.shape
    maxima = torch.full((batch, width), SMALLEST_SCALE, dtype=torch.float32, device=x.device)
    if batch and length:
        block = next_power_of_2(width)
        kept = None if mask is None else mask.to(torch.uint8).contiguous()
        form = (length, width, SMALLEST_SCALE, normalise, TOKENS_A_PROGRAM, block)
        programs, warps = (cdiv(length, TOKENS_A_PROGRAM), batch), row_warps(block, x.get_device())
        _channel_maxima_kernel[programs](
            x.contiguous(), kept, maxima.view(torch.int32), *form, num_warps=warps
        )
    return maxima


@registered("quantize_ordered", fake_quantized)
def _ordered(
    x: Tensor, order: Tensor, block_scale: Tensor, bits: int, group_size: int, clip: float
) -> tuple[Tensor, Tensor]:
    codes, scale = empty_quantized(x)
    form = (*x.shape[1:], clip, group_size, highest_code(bits))
    launch_by_row(_ordered_kernel, x.contiguous(), order, block_scale, codes, scale, *form)
    return codes, scale


def runtime_smooth_quantize(
    x: Tensor,
    bits: int,
    group_size: int,
    clip: float = 1.0,
    mask: Tensor | None = None,
    normalise: bool = False,
) -> QuantizedInput:
    """As `reference.runtime_smooth_quantize`."""
    maxima = _channel_maxima(x, mask, normalise)
    if group_size == 1:
        multiplier = channel_multipliers(maxima, bits).unsqueeze(-2)
        return quantize_smoothed(x, multiplier, bits, clip)
    ordered, order = maxima.sort(dim=-1, descending=True, stable=True)
    block_scale = ordered[:, ::group_size].contiguous()
    codes, scale = _ordered(x, order, block_scale, bits, group_size, clip)
    return QuantizedInput(codes, scale, block_scale, order)
