"""The operators on a CPU: exact integer products, floats in float32.

`csrc/` has what PyTorch lacks, compiled when smoothq is installed and chosen by instruction set at
run time: a quantizer in one pass, and products that read each weight once. `native.py` calls it.

Where SMOOTHQ_CPU_ISA=pytorch chooses PyTorch's own operators, integer products are exact in two
ways: `torch._int_mm`, which is fast where the processor has int8 dot products (AVX512-VNNI, AMX),
and float32 lanes, in which a block of 1,024 products of at most 128 · 128 cannot exceed 2²⁴ and so
is never rounded. All give the same integer.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..formats import e4m3_values
from ..reference import (
    PACKED_BLOCK,
    QuantizedInput,
    Scaling,
    attend,
    by_group,
    channel_multipliers,
    dequantize_heads,
    fp8_quantize,
    fp_scales,
    fp_tensor_scale,
    fp_values,
    multiplied_weight,
    mx_quantize,
    mx_values,
    quantize_heads,
    row_parts,
    runtime_smooth_quantize,
    tensor_scale,
    unpack_codes,
    unpack_int4,
    with_first_tokens,
)
from . import native
from .native import is_compiled as is_compiled

Arguments = ParamSpec("Arguments")

EXACT_BLOCK = 1024  # 1,024 · 128 · 128 = 2^24, the last integer up to which float32 has no gaps
QUERY_ROWS = 512  # int8_attention's working set: the scores of this many queries
UNPACK_ROWS = 256  # weight_only_gemm's working set: this many rows of the matrix in float32
PACKED_TOKENS = 4  # up to so many, 4-bit weights are faster packed than as int8 (operators.cpp)
RIGHT_FACTOR = 256  # of a rotation: one row of it stays in the first cache


def _compiled(by_pytorch: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """The compiled operator of a function's name, or the function where PyTorch's were chosen."""
    name = by_pytorch.__name__

    @functools.wraps(by_pytorch)
    def operator(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        if not is_compiled():
            return by_pytorch(*args, **kwargs)
        result: Tensor = getattr(torch.ops.smoothq, name)(*args, **kwargs)
        return result

    return operator


def quantize_per_token(
    x: Tensor, bits: int, clip: float = 1.0, full_range: bool = False
) -> QuantizedInput:
    """As `reference.quantize_per_token`."""
    if not is_compiled():
        return reference.quantize_per_token(x, bits, clip, full_range)
    return QuantizedInput(*native.quantize(x, _token_mode(full_range), bits, clip))


def _token_mode(full_range: bool) -> str:
    return "full_range" if full_range else "token"


def quantize_per_tensor(x: Tensor, bits: int, clip: float = 1.0) -> QuantizedInput:
    """As `reference.quantize_per_tensor`: PyTorch's maximum, then one pass."""
    return static_quantize(x, tensor_scale(x, bits, clip), bits)


def static_quantize(x: Tensor, scale: Tensor, bits: int) -> QuantizedInput:
    """As `reference.static_quantize`."""
    if not is_compiled():
        return reference.static_quantize(x, scale, bits)
    codes, _ = native.quantize(x, "static", bits, scale=scale)
    return QuantizedInput(codes, scale.float().reshape([1] * x.dim()))


def quantize_smoothed(
    x: Tensor, multiplier: Tensor, bits: int, clip: float = 1.0
) -> QuantizedInput:
    """As `reference.quantize_smoothed`; multipliers that differ by sequence run on PyTorch."""
    if multiplier.dim() > 1 or not is_compiled():
        return reference.quantize_smoothed(x, multiplier, bits, clip)
    return QuantizedInput(*native.quantize(x, "smoothed", bits, clip, multiplier=multiplier))


def quantize_token_groups(
    x: Tensor, bits: int, group_size: int, clip: float = 1.0
) -> QuantizedInput:
    """As `reference.quantize_token_groups`."""
    if not is_compiled():
        return reference.quantize_token_groups(x, bits, group_size, clip)
    return QuantizedInput(*native.quantize(x, "groups", bits, clip, group_size=group_size))


def fp_quantize(
    x: Tensor,
    element: str,
    scaling: Scaling,
    group_size: int = 0,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """As `reference.fp_quantize`; the maximum of a whole tensor is PyTorch's."""
    if not is_compiled():
        return reference.fp_quantize(x, element, scaling, group_size, tensor_scale)
    if scaling == "tensor":
        scaling, tensor_scale = "static", fp_tensor_scale(x.float(), element)
    return native.fp_quantized(x, element, scaling, group_size, tensor_scale)


def multiplies_fp8(device: torch.device, architecture: str | None = None) -> bool:
    """See `kernels.multiplies_fp8`: no CPU does."""
    return False


def multiplies_mx(device: torch.device, architecture: str | None = None) -> bool:
    """See `kernels.multiplies_mx`: no CPU does."""
    return False


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


@_compiled
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


@_compiled
def int4_gemm(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int4_gemm`: few tokens meet the packed weights, many an unpacked copy."""
    weight = multiplied_weight(unpack_int4(packed, codes.shape[1]), multiplier)
    return int8_gemm(codes, scale, weight, weight_scale, bias, dtype)


@_compiled
def expert_gemm(
    codes: Tensor,
    scale: Tensor,
    ends: Tensor,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.expert_gemm`, the scaling in float32; weights are unpacked."""
    result = codes.new_zeros(codes.shape[0], weights[0].shape[0], dtype=dtype)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows, weight = slice(start, end), weights[expert]
            if weight.dtype == torch.uint8:
                weight = unpack_int4(weight, codes.shape[1])
                weight = multiplied_weight(weight, multipliers[expert] if multipliers else None)
            step = scale if scale.shape[0] == 1 else scale[rows]
            bias = biases[expert] if biases else None
            product = int8_gemm(codes[rows], step, weight, weight_scales[expert], bias, dtype)
            result[rows], start = product, end
    return result


def _fits(group_size: int) -> bool:
    """Whether groups are whole packed blocks, or halves of one, as the native products need."""
    return group_size % PACKED_BLOCK == 0 or group_size == PACKED_BLOCK // 2


def packed_tokens(operator: str, group_size: int | None) -> int:
    """See `kernels.packed_tokens`: any number for float inputs, few for integer ones."""
    if operator == "weight_only_gemm":
        return sys.maxsize
    return PACKED_TOKENS if is_compiled() and (group_size is None or _fits(group_size)) else 0


def left_factor(base: int, order: int) -> int | None:
    """See `kernels.left_factor`: the smallest with a right factor of at most RIGHT_FACTOR.

    The right factor is a butterfly, the left one a dense product. None without the compiled
    operators: then both are dense.
    """
    return max(base, order // RIGHT_FACTOR) if is_compiled() else None


@_compiled
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
    floats: Any = {"dtype": torch.float32, "device": codes.device}
    result = torch.zeros(batch, length, weight.shape[0], **floats)
    factor = block_scale
    if factor is None:
        factor = torch.ones(batch, width // group_size, **floats)
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


@_compiled
def weight_only_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """As `reference.weight_only_gemm`, in float32, without a float copy of the matrix."""
    x32 = x.float()
    result = torch.empty(x.shape[0], packed.shape[0], dtype=torch.float32, device=x.device)
    for row in range(0, packed.shape[0], UNPACK_ROWS):
        rows = slice(row, row + UNPACK_ROWS)
        weight = unpack_codes(packed[rows], x.shape[1], bits)
        step = weight_scale[rows].float()
        if multiplier is not None:
            step = step * multiplier[rows]
        _rows_product(x32, weight.float(), step, result[:, rows])
    return (result if bias is None else result.add_(bias)).to(x.dtype)


def _rows_product(x: Tensor, weight: Tensor, step: Tensor, out: Tensor) -> None:
    """out = x (weight · step)ᵀ, float32: weight (n, K), which is overwritten, step (n, G)."""
    weight.view(len(weight), step.shape[-1], -1).mul_(step.unsqueeze(-1))
    torch.mm(x, weight.t(), out=out)


@_compiled
def fp_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    element: str,
) -> Tensor:
    """As `reference.fp_gemm`, in float32, without a float copy of the matrix."""
    x32 = x.float()
    result = torch.empty(x.shape[0], packed.shape[0], dtype=torch.float32, device=x.device)
    for row in range(0, packed.shape[0], UNPACK_ROWS):
        rows = slice(row, row + UNPACK_ROWS)
        weight = fp_values(packed[rows], element, x.shape[1])
        _rows_product(x32, weight, fp_scales(scale[rows], tensor_scale), result[:, rows])
    return (result if bias is None else result.add_(bias)).to(x.dtype)


def fp8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.fp8_gemm`, in float32: the product of what the codes of tokens stand for."""
    x = by_group(e4m3_values(codes), scale.expand(codes.shape[0], -1))
    return fp_gemm(x, weight, weight_scale, None, bias, "e4m3").to(dtype)


def mx_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    element: str,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.mx_gemm`, in float32: the product of what the codes of tokens stand for."""
    x = mx_values(codes, scale, element)
    return fp_gemm(x, weight, weight_scale, None, bias, element).to(dtype)


@_compiled
def expert_weight_only_gemm(
    x: Tensor,
    ends: Tensor,
    packed: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    bits: int,
) -> Tensor:
    """As `reference.expert_weight_only_gemm`, in float32."""
    result = x.new_zeros(x.shape[0], packed[0].shape[0])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            multiplier = multipliers[expert] if multipliers else None
            bias = biases[expert] if biases else None
            weight = (packed[expert], weight_scales[expert], multiplier, bias, bits)
            result[start:end], start = weight_only_gemm(x[start:end], *weight), end
    return result


def hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, in float32 (in float64 for float64 input)."""
    if x.dtype != torch.float64 and is_compiled():
        return native.rotate(x, signs, left, right)
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
    factors = (signs, left, right)
    if not is_compiled():
        rotated = hadamard(x.float(), *factors)
        return reference.quantize_rotated(rotated, bits, group_size, clip, full_range)
    mode = _token_mode(full_range) if group_size is None else "groups"
    quantized = native.quantize(x, mode, bits, clip, group_size=group_size or 0, rotation=factors)
    return QuantizedInput(*quantized)


@_compiled
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


@_compiled
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
    shape = (batch, queries, length, values.shape[-1])
    result = torch.empty(shape, dtype=dtype, device=codes.device)
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
