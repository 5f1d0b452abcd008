"""The operators on a CPU: exact integer products, floats in float32.

The quantizers are the reference itself: a few element-wise passes beside the product. A sum of
int8 × int8 products is exact in two ways: `torch._int_mm`, which is fast where the processor has
int8 dot products (AVX512-VNNI, AMX), and float32 lanes, in which a block of 1,024 products of at
most 128 · 128 cannot exceed 2²⁴ and so is never rounded. Both give the same integer; the processor
decides which one runs.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import (
    QuantizedInput,
    attend,
    channel_multipliers,
    dequantize_heads,
    multiplied_weight,
    quantize_heads,
    quantize_per_tensor,
    quantize_per_token,
    quantize_rotated,
    quantize_smoothed,
    quantize_token_groups,
    row_parts,
    runtime_smooth_quantize,
    static_quantize,
    unpack_int4,
    with_first_tokens,
)

__all__ = [
    "cached_attention",
    "channel_multipliers",
    "group_gemm",
    "hadamard",
    "hadamard_quantize",
    "int4_gemm",
    "int8_attention",
    "int8_gemm",
    "int8_matmul",
    "left_factor",
    "quantize_heads",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_smoothed",
    "quantize_token_groups",
    "runs_packed",
    "runtime_smooth_quantize",
    "static_quantize",
    "weight_only_gemm",
]

EXACT_BLOCK = 1024  # 1,024 · 128 · 128 = 2^24, the last integer up to which float32 has no gaps
QUERY_ROWS = 512  # int8_attention's working set: the scores of this many queries
UNPACK_ROWS = 256  # weight_only_gemm's working set: this many rows of the matrix in float32


def _float_lanes(a: Tensor, w: Tensor) -> Tensor:
    """float32 (M, N), the integer sum rounded once: exact below 2²⁴."""
    parts = [
        a[:, k : k + EXACT_BLOCK].float() @ w[:, k : k + EXACT_BLOCK].float().t()
        for k in range(0, a.shape[1], EXACT_BLOCK)
    ]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0].add_(parts[1])
    return sum((part.to(torch.int32) for part in parts[1:]), parts[0].to(torch.int32)).float()


def _int_mm(a: Tensor, w: Tensor) -> Tensor:
    """float32 (M, N), the integer sum rounded once."""
    if a.shape[1] == 1:
        return _float_lanes(a, w)  # torch misreads the strides of one column's transpose
    return torch._int_mm(a, w.t()).float()


@functools.cache
def _has_fast_int_mm() -> bool:
    """Whether oneDNN's int8 product runs here; elsewhere `_int_mm` is a plain loop."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("amx_int8"))


def int8_matmul(a: Tensor, w: Tensor) -> Tensor:
    """Σ_k a_mk w_nk in integers, rounded once to float32: exact below 2²⁴.

    a: int8 (M, K); w: int8 (N, K). Returns float32 (M, N).
    """
    return _int_mm(a, w) if _has_fast_int_mm() else _float_lanes(a, w)


def int8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int8_gemm`, the scaling in float32."""
    result = int8_matmul(codes, weight).mul_(scale).mul_(weight_scale)
    return (result if bias is None else result.add_(bias)).to(dtype)


def int4_gemm(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int4_gemm`: unpacked, then `int8_gemm`."""
    weight = multiplied_weight(unpack_int4(packed, codes.shape[1]), multiplier)
    return int8_gemm(codes, scale, weight, weight_scale, bias, dtype)


def runs_packed(operator: str, group_size: int | None) -> bool:
    """Only `weight_only_gemm` takes packed weights as they are: integer ones run as int8."""
    del group_size
    return operator == "weight_only_gemm"


def left_factor(base: int, order: int) -> int | None:
    """As the rotation is stored: two factors of like size make the fewest operations."""
    del base, order
    return None


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
    """As `reference.group_gemm`, the scaling and the sum over blocks in float32."""
    batch, length, width = codes.shape
    result = torch.zeros(batch, length, weight.shape[0])
    factor = torch.ones(batch, width // group_size) if block_scale is None else block_scale
    grouped = weight_scale.shape[1] > 1
    for b in range(batch):
        columns = weight if order is None else weight[:, order[b]]
        for g in range(width // group_size):
            block = slice(g * group_size, (g + 1) * group_size)
            if grouped:
                a, w = codes[b, :, block].contiguous(), columns[:, block].contiguous()
                result[b].addcmul_(int8_matmul(a, w), weight_scale[:, g].float() * factor[b, g])
            else:  # one factor a block: the product adds itself, times it, to the result
                a, w = codes[b, :, block].float(), columns[:, block].float()
                result[b].addmm_(a, w.t(), alpha=float(factor[b, g]))
    result *= scale
    if not grouped:
        result *= weight_scale.float().t()
    return (result if bias is None else result.add_(bias)).to(dtype)


def weight_only_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """As `reference.weight_only_gemm`, in float32, a few rows of the matrix unpacked at a time."""
    x32 = x.float()
    result = torch.empty(x.shape[0], packed.shape[0])
    for row in range(0, packed.shape[0], UNPACK_ROWS):
        rows = slice(row, row + UNPACK_ROWS)
        weight = unpack_int4(packed[rows], x.shape[1]) if bits == 4 else packed[rows]
        step = weight_scale[rows].float()
        if multiplier is not None:
            step = step * multiplier[rows]
        dense = weight.float().unflatten(-1, (step.shape[-1], -1)).mul_(step.unsqueeze(-1))
        torch.mm(x32, dense.flatten(-2).t(), out=result[:, rows])
    return (result if bias is None else result.add_(bias)).to(x.dtype)


def hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, as two small products in float32 (float64 for float64 input)."""
    work = x if x.dtype == torch.float64 else x.float()
    norm = (left.shape[0] * right.shape[0]) ** 0.5
    blocks = (work * signs).unflatten(-1, (-1, left.shape[0], right.shape[0]))
    rotated: Tensor = left.to(work.dtype).t() @ (blocks @ (right.to(work.dtype) / norm))
    return rotated.flatten(-3).to(x.dtype)


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
    """As `reference.hadamard_quantize`, rotated in float32."""
    rotated = hadamard(x.float(), signs, left, right)
    return quantize_rotated(rotated, bits, group_size, clip, full_range)


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    start: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int | None,
) -> Tensor:
    """As `reference.cached_attention`, in float32: rows unpacked, then PyTorch's own product."""
    k, v = (
        with_first_tokens(dequantize_heads(rows, bits, group_size, torch.float32), first, start)
        for rows, first in ((keys, first_keys), (values, first_values))
    )
    result = F.scaled_dot_product_attention(
        query.float(), k, v, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return result.to(query.dtype)


def int8_attention(
    codes: Tensor,
    scale: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int8_attention`: a head's sums by `int8_matmul`, the rest in float32."""
    batch, queries, length, _ = codes.shape
    key_codes, key_scale, key_offset = (part.squeeze(-2) for part in row_parts(keys, bits, None))
    if values.dtype == torch.uint8:
        values = dequantize_heads(values, bits, None, torch.float32)
    result = torch.empty(batch, queries, length, values.shape[-1], dtype=dtype)
    for b, head in itertools.product(range(batch), range(queries)):
        h = head * keys.shape[1] // queries
        k, k_scale, k_offset = key_codes[b, h].contiguous(), key_scale[b, h], key_offset[b, h]
        v = values[b, h].float()
        seen = None if mask is None else mask[b if mask.shape[0] > 1 else 0, 0]
        for row in range(0, length, QUERY_ROWS):
            rows = slice(row, row + QUERY_ROWS)
            a = codes[b, head, rows].contiguous()
            scores = int8_matmul(a, k).mul_(k_scale.float().t())
            scores.addmm_(a.sum(-1, keepdim=True).float(), k_offset.float().t())
            scores *= scale[b, head, rows] * scaling
            result[b, head, rows] = attend(scores, v, None if seen is None else seen[rows])
    return result
