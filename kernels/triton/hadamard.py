"""Hadamard rotations, alone and in one pass into the quantizer.

A token of K = l · r channels is read as a matrix V (l, r); its rotation is H_leftᵀ V H_right, two
small products for the tensor cores. The factors hold ±1, exact in bfloat16; a float32 operand is
cut into three bfloat16 parts that add up to it, so that the products are as good as float32 ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import QuantizedInput, highest_code, largest_multiplier
from .codes import per_token, token_groups
from .launch import check_float, operand, rows_of
from .quantize import empty_quantized, quantize_per_token, quantize_token_groups

SMALLEST_DOT = 16
TILE = 64  # rows and columns of a plain rotation's tile
WIDEST_FACTOR = 128  # of the fused form: one token's matrix, at most 128 × 128, stays in registers


@triton.jit
def _part(v):
    """The upper bits of float32 v as a bfloat16 value, and what it leaves."""
    high = v.to(tl.bfloat16)
    return high, v - high.to(tl.float32)


@triton.jit
def _sign_dot(signs, v, OPERAND: tl.constexpr, IN_16_BITS: tl.constexpr):
    """signs (±1 or 0, OPERAND) times v, float32; IN_16_BITS: v is exact in bfloat16."""
    high, rest = _part(v)
    total = tl.dot(signs, high.to(OPERAND))
    if not IN_16_BITS:
        middle, rest = _part(rest)
        total = tl.dot(signs, middle.to(OPERAND), total)
        total = tl.dot(signs, rest.to(tl.bfloat16).to(OPERAND), total)
    return total


@triton.jit
def _dot_sign(v, signs, OPERAND: tl.constexpr, IN_16_BITS: tl.constexpr):
    """v, float32, times signs, as `_sign_dot`."""
    high, rest = _part(v)
    total = tl.dot(high.to(OPERAND), signs)
    if not IN_16_BITS:
        middle, rest = _part(rest)
        total = tl.dot(middle.to(OPERAND), signs, total)
        total = tl.dot(rest.to(tl.bfloat16).to(OPERAND), signs, total)
    return total


@triton.jit
def _factor(pointer, rows, columns, ORDER, stride_row, stride_column, OPERAND: tl.constexpr):
    """Entries of a factor (ORDER, ORDER), zero outside."""
    inside = (rows < ORDER)[:, None] & (columns < ORDER)[None, :]
    pointers = pointer + rows[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(pointers, mask=inside, other=0).to(OPERAND)


@triton.jit
def _hadamard_kernel(
    x,
    signs,
    left,
    right,
    out,
    L,
    R,
    left_row,
    left_column,
    right_row,
    right_column,
    K,
    norm,
    OPERAND: tl.constexpr,
    IN_16_BITS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of one block's result: Σ_l left[l, i] (Σ_r V[l, r] right[r, j])."""
    token = tl.program_id(0).to(tl.int64)
    base = tl.program_id(1) * L * R
    tiles_r = tl.cdiv(R, BLOCK_R)
    i = (tl.program_id(2) // tiles_r) * BLOCK_L + tl.arange(0, BLOCK_L)
    j = (tl.program_id(2) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    for l0 in range(0, L, STEP):
        rows = l0 + tl.arange(0, STEP)
        half = tl.zeros([STEP, BLOCK_R], tl.float32)
        for r0 in range(0, R, STEP):
            columns = r0 + tl.arange(0, STEP)
            inside = (rows < L)[:, None] & (columns < R)[None, :]
            offsets = base + rows[:, None] * R + columns[None, :]
            v = tl.load(x + token * K + offsets, mask=inside, other=0.0).to(tl.float32)
            v *= tl.load(signs + offsets, mask=inside, other=0).to(tl.float32)
            h = _factor(right, columns, j, R, right_row, right_column, OPERAND)
            half += _dot_sign(v, h, OPERAND, IN_16_BITS)
        h = _factor(left, i, rows, L, left_column, left_row, OPERAND)  # transposed
        total += _sign_dot(h, half, OPERAND, False)
    inside = (i < L)[:, None] & (j < R)[None, :]
    pointers = out + token * K + base + i[:, None] * R + j[None, :]
    tl.store(pointers, (total * norm).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hadamard_quantize_kernel(
    x,
    signs,
    left,
    right,
    codes,
    scales,
    K,
    left_row,
    left_column,
    right_row,
    right_column,
    norm,
    clip,
    L: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    IN_16_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HIGHEST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One whole token, its matrix (L, R) padded to ROWS, rotated and quantized in registers."""
    token = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, R)
    inside = (rows < L)[:, None] & (columns < R)[None, :]
    offsets = rows[:, None] * R + columns[None, :]
    v = tl.load(x + token * K + offsets, mask=inside, other=0.0).to(tl.float32)
    v *= tl.load(signs + offsets, mask=inside, other=0).to(tl.float32)
    h = _factor(right, columns, columns, R, right_row, right_column, OPERAND)
    v = _dot_sign(v, h, OPERAND, IN_16_BITS)
    h = _factor(left, rows, rows, L, left_column, left_row, OPERAND)  # transposed
    v = _sign_dot(h, v, OPERAND, False) * norm
    if GROUP == 0:
        found, scale = per_token(v, clip, HIGHEST, -HIGHEST - 1)
        tl.store(codes + token * K + offsets, found, mask=inside)
    else:
        COUNT: tl.constexpr = ROWS * R // GROUP
        found, scale = token_groups(v.reshape(COUNT, GROUP), clip, HIGHEST, LARGEST)
        channel = tl.arange(0, COUNT)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(codes + token * K + channel, found, mask=channel < L * R)
    tl.store(scales + token, scale)


@torch.library.custom_op("smoothq::triton_hadamard", mutates_args=())
def _hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    check_float(x, "hadamard")
    rows, out = rows_of(x), torch.empty(x.shape, dtype=dtype, device=x.device)
    tokens, width = rows.shape
    L, R = left.shape[0], right.shape[0]
    if tokens:
        tiles = triton.cdiv(L, TILE) * triton.cdiv(R, TILE)
        _hadamard_kernel[(tokens, width // (L * R), tiles)](
            rows,
            signs,
            left,
            right,
            out,
            L,
            R,
            *left.stride(),
            *right.stride(),
            width,
            (L * R) ** -0.5,
            operand(torch.bfloat16),
            x.dtype == torch.bfloat16,
            TILE,
            TILE,
            32,
            num_warps=4,
        )
    return out


@torch.library.custom_op("smoothq::triton_hadamard_quantize", mutates_args=())
def _fused(
    x: Tensor, signs: Tensor, left: Tensor, right: Tensor, bits: int, group_size: int, clip: float
) -> tuple[Tensor, Tensor]:
    check_float(x, "hadamard_quantize")
    rows, (codes, scale) = rows_of(x), empty_quantized(x)
    if rows.shape[0]:
        L, R = left.shape[0], right.shape[0]
        padded = max(triton.next_power_of_2(L), SMALLEST_DOT)
        _hadamard_quantize_kernel[(rows.shape[0],)](
            rows,
            signs,
            left,
            right,
            codes,
            scale,
            rows.shape[1],
            *left.stride(),
            *right.stride(),
            (L * R) ** -0.5,
            clip,
            L,
            R,
            padded,
            operand(torch.bfloat16),
            x.dtype == torch.bfloat16,
            group_size,
            highest_code(bits),
            largest_multiplier(bits),
            num_warps=min(max(padded * R // 2048, 2), 8),
        )
    return codes, scale


@_hadamard.register_fake
def _(x: Tensor, signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@_fused.register_fake
def _(
    x: Tensor, signs: Tensor, left: Tensor, right: Tensor, bits: int, group_size: int, clip: float
) -> tuple[Tensor, Tensor]:
    return empty_quantized(x)


def hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, in float32."""
    rotated: Tensor = _hadamard(x, signs, left, right, x.dtype)
    return rotated


def fuses(width: int, left: int, right: int, group_size: int | None) -> bool:
    """Whether one program holds a token, so that rotation and quantizer are one kernel."""
    fits = left <= WIDEST_FACTOR and SMALLEST_DOT <= right <= WIDEST_FACTOR
    power_of_two = group_size is None or group_size & (group_size - 1) == 0
    return fits and power_of_two and left * right == width


def hadamard_quantize(
    x: Tensor,
    signs: Tensor,
    left: Tensor,
    right: Tensor,
    bits: int,
    group_size: int | None = None,
    clip: float = 1.0,
) -> QuantizedInput:
    """As `reference.hadamard_quantize`: one kernel where `fuses`, else two with float32 between."""
    if fuses(x.shape[-1], left.shape[0], right.shape[0], group_size):
        return QuantizedInput(*_fused(x, signs, left, right, bits, group_size or 0, clip))
    rotated = _hadamard(x, signs, left, right, torch.float32)
    if group_size is None:
        return quantize_per_token(rotated, bits, clip)
    return quantize_token_groups(rotated, bits, group_size, clip)
