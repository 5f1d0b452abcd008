"""Hadamard rotations, alone and in one pass into the quantizer.

A token of K = l · r channels is read as a matrix V (l, r); its rotation is H_leftᵀ V H_right. r is
a power of two, its Hadamard matrix Sylvester's, so that it splits again: the fused form rotates the
three axes of (l, a, b) one after the other, each by a small product for the tensor cores. The
factors hold ±1, exact in bfloat16; a float32 operand is cut into three bfloat16 parts that add up
to it, so that the products are as good as float32 ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import QuantizedInput, highest_code, largest_group_multiplier
from .codes import per_token, token_groups
from .launch import cdiv, check_float, next_power_of_2, operand, registered, row_count
from .quantize import empty_quantized, fake_quantized, quantize_per_token, quantize_token_groups

SMALLEST_DOT = 16
TILE = 64  # rows and columns of a plain rotation's tile
WIDEST_LEFT, WIDEST_AXIS = 64, 128  # orders of one product in the fused form
LARGEST_TOKEN = {2: 16384, 4: 8192}  # of x's bytes: channels that one program's registers hold


@triton.jit
def _part(v):
    """The upper bits of float32 v as a bfloat16 value, and what it leaves."""
    high = v.to(tl.bfloat16)
    return high, v - high.to(tl.float32)


@triton.jit
def _times_signs(v, signs, OPERAND: tl.constexpr, EXACT: tl.constexpr):
    """v, float32, times ±1 (or 0) of dtype OPERAND, in float32; EXACT: OPERAND holds v as it is."""
    if EXACT:
        total = tl.dot(v.to(OPERAND), signs)
    else:
        high, rest = _part(v)
        middle, rest = _part(rest)
        total = tl.dot(high.to(OPERAND), signs)
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
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
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
    total = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    for l0 in range(0, L, STEP):
        rows = l0 + tl.arange(0, STEP)
        half = tl.zeros([STEP, BLOCK_R], tl.float32)
        for r0 in range(0, R, STEP):
            columns = r0 + tl.arange(0, STEP)
            inside = (rows < L)[:, None] & (columns < R)[None, :]
            offsets = base + rows[:, None] * R + columns[None, :]
            v = tl.load(x + token * K + offsets, mask=inside, other=0.0).to(tl.float32)
            v *= tl.load(signs + offsets, mask=inside, other=0).to(tl.float32)
            h = _factor(right, columns, j, R, right_row, right_column, FIRST)
            half += _times_signs(v, h, FIRST, EXACT)
        h = _factor(left, rows, i, L, left_row, left_column, OPERAND)
        total += _times_signs(half.trans(), h, OPERAND, False)
    inside = (j < R)[:, None] & (i < L)[None, :]
    pointers = out + token * K + base + i[None, :] * R + j[:, None]
    tl.store(pointers, (total * norm).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sylvester(ORDER: tl.constexpr, OPERAND: tl.constexpr):
    """Sylvester's matrix: −1 where the two indices share an odd number of bits. ORDER ≤ 256."""
    index = tl.arange(0, ORDER)
    shared = index[:, None] & index[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return (1 - 2 * (shared & 1)).to(OPERAND)


@triton.jit
def _hadamard_quantize_kernel(
    x,
    signs,
    left,
    codes,
    scales,
    K,
    left_row,
    left_column,
    norm,
    clip,
    L: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    OPERAND: tl.constexpr,
    GROUP: tl.constexpr,
    FULL_RANGE: tl.constexpr,
    HIGHEST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One whole token as (L, A, B), padded to ROWS, rotated axis by axis, and quantized."""
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS * A)[:, None], tl.arange(0, B)[None, :]
    inside = row < L * A
    v = tl.load(x + token * K + row * B + column, mask=inside, other=0.0).to(tl.float32)
    v *= tl.load(signs + row * B + column, mask=inside, other=0).to(tl.float32)
    v = _times_signs(v, _sylvester(B, FIRST), FIRST, EXACT)
    if A > 1:
        v = v.reshape(ROWS, A, B).permute(0, 2, 1).reshape(ROWS * B, A)
        v = _times_signs(v, _sylvester(A, OPERAND), OPERAND, False)
        v = v.reshape(ROWS, B, A).permute(0, 2, 1)
    v = v.reshape(ROWS, A * B)
    if L > 1:
        rows = tl.arange(0, ROWS)
        h = _factor(left, rows, rows, L, left_row, left_column, OPERAND)
        v = _times_signs(v.trans(), h, OPERAND, False).trans()
    v *= norm
    if GROUP == 0:
        channel = tl.arange(0, ROWS)[:, None] * (A * B) + tl.arange(0, A * B)[None, :]
        quantized, scale = per_token(v, clip, HIGHEST, FULL_RANGE)
    else:
        COUNT: tl.constexpr = ROWS * A * B // GROUP
        channel = tl.arange(0, COUNT)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        quantized, scale = token_groups(v.reshape(COUNT, GROUP), clip, HIGHEST, LARGEST)
    tl.store(codes + token * K + channel, quantized, mask=channel < K)
    tl.store(scales + token, scale)


@registered(
    "hadamard",
    lambda x, signs, left, right, dtype: torch.empty(x.shape, dtype=dtype, device=x.device),
)
def _hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tokens, width = row_count(x), x.shape[-1]
    L, R = left.shape[0], right.shape[0]
    if tokens:
        tiles = cdiv(L, TILE) * cdiv(R, TILE)
        _hadamard_kernel[(tokens, width // (L * R), tiles)](
            x.contiguous(),
            signs.contiguous(),
            left,
            right,
            out,
            L,
            R,
            *left.stride(),
            *right.stride(),
            width,
            (L * R) ** -0.5,
            *_operands(x.dtype),
            TILE,
            TILE,
            32,
            num_warps=8,
        )
    return out


@registered("hadamard_quantize", fake_quantized)
def _fused(
    x: Tensor,
    signs: Tensor,
    left: Tensor,
    right: int,
    bits: int,
    group_size: int,
    clip: float,
    full_range: bool,
) -> tuple[Tensor, Tensor]:
    codes, scale = empty_quantized(x)
    if tokens := row_count(x):
        L = left.shape[0]
        padded, (a, b) = _padded(L), _axes(right)
        _hadamard_quantize_kernel[(tokens,)](
            x.contiguous(),
            signs.contiguous(),
            left,
            codes,
            scale,
            x.shape[-1],
            *left.stride(),
            (L * right) ** -0.5,
            clip,
            L,
            a,
            b,
            padded,
            *_operands(x.dtype),
            group_size,
            full_range,
            highest_code(bits),
            largest_group_multiplier(bits) if group_size else 0,
            num_warps=min(max(padded * right // 1024, 1), 16),
        )
    return codes, scale


def hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, in float32."""
    check_float(x, "hadamard")
    rotated: Tensor = _hadamard(x, signs, left, right, x.dtype)
    return rotated


def _operands(dtype: torch.dtype) -> tuple[tl.dtype, bool, tl.dtype]:
    """What x is multiplied as, whether that holds it exactly, and what later products take."""
    parts = operand(torch.bfloat16)
    return (parts, False, parts) if dtype == torch.float32 else (operand(dtype), True, parts)


def left_factor(base: int, order: int) -> int:
    """The order of the left factor that runs fastest: small factors make small products."""
    return base if base > 1 else min(order, 32)


def _padded(left: int) -> int:
    return max(next_power_of_2(left), SMALLEST_DOT if left > 1 else 1)


def _axes(right: int) -> tuple[int, int]:
    """A power of two as two factors of 16 at least, or as one of 128 at most."""
    if right <= WIDEST_AXIS:
        return 1, right
    bits = right.bit_length() - 1
    return 1 << bits // 2, 1 << (bits - bits // 2)


def fuses(x: Tensor, left: int, right: int, group_size: int | None) -> bool:
    """Whether one program holds a token, so that rotation and quantizer are one kernel."""
    largest = LARGEST_TOKEN[x.dtype.itemsize]
    fits = left <= WIDEST_LEFT and right >= SMALLEST_DOT and _padded(left) * right <= largest
    power_of_two = group_size is None or group_size & (group_size - 1) == 0
    return fits and power_of_two and left * right == x.shape[-1]


def hadamard_quantize(
    x: Tensor,
    signs: Tensor,
    left: Tensor,
    right: Tensor,
    bits: int,
    group_size: int | None = None,
    clip: float = 1.0,
    full_range: bool = False,
) -> QuantizedInput:
    """As `reference.hadamard_quantize`: one kernel where `fuses`, else two with float32 between."""
    check_float(x, "hadamard_quantize")
    if fuses(x, left.shape[0], right.shape[0], group_size):
        form = (right.shape[0], bits, group_size or 0, clip, full_range)
        return QuantizedInput(*_fused(x, signs, left, *form))
    rotated = _hadamard(x, signs, left, right, torch.float32)
    if group_size is None:
        return quantize_per_token(rotated, bits, clip, full_range)
    return quantize_token_groups(rotated, bits, group_size, clip)
