"""weight_only_gemm: float tokens times packed weights, unpacked inside.

Codes are exact in bfloat16 and float16, so that they go into the tensor cores as they are; one
scale a row comes at the end, and group scales (or a row's scale times a group's multiplier) at the
end of each group's sum, as in group_gemm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import token_bucket
from .fp_gemm import word_gemm
from .launch import (
    DECODE_TOKENS,
    Tuned,
    carries_float_sums,
    check_float,
    contiguous,
    dtypes,
    on_its_device,
    operand,
    packed_tokens,
    runs_ptx,
    tile,
    tiles_grid,
)
from .nibbles import as_floats, load_packed
from .tiles import add_bias_and_store, load_columns, tile_of

PREFILL_TILES = {
    "small": tile(64, 32, 4, 3, band=8, BLOCK_K=64),
    "wide": tile(128, 64, 8, 3, band=8, BLOCK_K=64),
    "square": tile(128, 128, 8, 3, band=8, BLOCK_K=64),
    "square, deep": tile(128, 128, 8, 3, band=8, BLOCK_K=128),
}
DECODE_TILES = {
    "narrow": tile(32, 16, 2, 4, BLOCK_K=64),
    "short": tile(64, 16, 4, 4, BLOCK_K=64),
    "long": tile(64, 16, 4, 4, BLOCK_K=128),
    "longest": tile(64, 16, 4, 4, BLOCK_K=256),
    "narrow, long": tile(32, 16, 2, 4, BLOCK_K=256),
}


@triton.heuristics({"EVEN": lambda args: (args["GROUP"] or args["K"]) % args["BLOCK_K"] == 0})
@triton.jit
def _weight_only_kernel(
    x,
    weight,
    weight_scale,
    multiplier,
    bias,
    out,
    M,
    N,
    K,
    row_bytes,
    groups,
    token_bucket,
    OPERAND: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_g s_ng · (Σ_{k in g} x[m, k] weight[n, k]); without GROUPED s_n comes last.

    GROUP: columns that share a scale; 0 for all. EVEN: no step goes past a group, or past K.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    token_rows, weight_rows = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    total = float_sums(
        x + token_rows[None, :] * K,
        weight + weight_rows[:, None] * row_bytes,
        weight_scale,
        multiplier,
        weight_rows,
        K,
        groups,
        OPERAND,
        PACKED,
        GROUPED,
        GROUP,
        EVEN,
        PTX,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
    )
    store_sums(total, weight_scale, bias, weight_rows, out, m, n, M, N, GROUPED)


@triton.jit
def float_sums(
    token_pointers,
    weight_pointers,
    weight_scale,
    multiplier,
    weight_rows,
    K,
    groups,
    OPERAND: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the sums, float32 (BLOCK_N, BLOCK_M), times the scales of groups where GROUPED."""
    STEPS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K  # a group, where weights are int8
    steps = groups * STEPS if GROUP > 0 and not PACKED else tl.cdiv(K, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, steps):
        if PACKED:
            k = step * BLOCK_K
            group = k // GROUP if GROUP > 0 else 0
            a, b, packed = load_packed(token_pointers, weight_pointers, k, K, BLOCK_K, EVEN)
            a, b = a.to(OPERAND), b.to(OPERAND)
            w, v = as_floats(packed, OPERAND, PTX)
            if not GROUPED:
                total = tl.dot(w, a, total, input_precision="ieee")
                total = tl.dot(v, b, total, input_precision="ieee")
            elif GROUP % 64 == 0:  # both halves lie in one group
                part = tl.dot(w, a, input_precision="ieee")
                part = tl.dot(v, b, part, input_precision="ieee")
                total += part * group_scale(weight_scale, multiplier, weight_rows, group, groups)
            else:
                part = tl.dot(w, a, input_precision="ieee")
                total += part * group_scale(weight_scale, multiplier, weight_rows, group, groups)
                group = tl.minimum(k + 32, K - 1) // GROUP
                part = tl.dot(v, b, input_precision="ieee")
                total += part * group_scale(weight_scale, multiplier, weight_rows, group, groups)
        else:
            group = step // STEPS if GROUP > 0 else 0
            k = group * GROUP + (step % STEPS if GROUP > 0 else step) * BLOCK_K
            columns = k + tl.arange(0, BLOCK_K)
            inside = columns < ((group + 1) * GROUP if GROUP > 0 else K)
            a = load_columns(token_pointers, columns[:, None], inside[:, None], EVEN).to(OPERAND)
            w = load_columns(weight_pointers, columns[None, :], inside[None, :], EVEN).to(OPERAND)
            if GROUPED:
                part = tl.dot(w, a, input_precision="ieee")
                total += part * group_scale(weight_scale, multiplier, weight_rows, group, groups)
            else:
                total = tl.dot(w, a, total, input_precision="ieee")
    return total


@triton.jit
def store_sums(total, weight_scale, bias, weight_rows, out, m, n, M, N, GROUPED: tl.constexpr):
    """out[m, n] = total[n, m], times the row's scale where not GROUPED, + bias[n]."""
    result = tl.trans(total)
    if not GROUPED:
        result *= tl.load(weight_scale + weight_rows).to(tl.float32)[None, :]
    add_bias_and_store(result, bias, weight_rows, out, m, n, M, N)


@triton.jit
def group_scale(weight_scale, multiplier, rows, group, groups):
    """The scales of one group, float32 (rows, 1): stored as such, or a row's times a multiplier."""
    if multiplier is None:
        scale = tl.load(weight_scale + rows * groups + group).to(tl.float32)
    else:
        m = tl.load(multiplier + rows * groups + group).to(tl.float32)
        scale = tl.load(weight_scale + rows).to(tl.float32) * m
    return scale[:, None]


def tiles_that_fit(
    configs: list[triton.Config], named: dict[str, Any], **settings: Any
) -> list[triton.Config]:
    """The tiles whose step does not cross a packed group; for float32 the smallest alone.

    Without tensor cores for it, a float32 product holds its operands in registers.
    """
    if named["OPERAND"] == tl.float32:
        return configs[:1]
    group = settings["GROUP"] if settings["GROUPED"] and settings["PACKED"] else 0
    return [c for c in configs if c.kwargs["BLOCK_K"] == 64 or group % c.kwargs["BLOCK_K"] == 0]


def check_groups(operator: str, bits: int, groups: int, K: int) -> None:
    """Raise NotImplementedError for 4-bit groups that do not fit the packed blocks."""
    if bits == 4 and groups > 1 and not packed_tokens(operator, K // groups):
        raise NotImplementedError(
            f"{operator}: 4-bit groups of {K // groups} columns do not fit the packed blocks; "
            "unpack the weight and pass it as 8 bits"
        )


_KEY = ["N", "K", "token_bucket", "PACKED", "GROUPED", "GROUP"]
_prefill_kernel = Tuned(_weight_only_kernel, PREFILL_TILES, _KEY, tiles_that_fit)
_decode_kernel = Tuned(_weight_only_kernel, DECODE_TILES, _KEY, tiles_that_fit)


@on_its_device
def weight_only_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """As `reference.weight_only_gemm`, summed in float32.

    Raises NotImplementedError for 4-bit groups that do not fit the packed blocks: `packed_tokens`.
    """
    check_float(x, "weight_only_gemm")
    if bits not in (4, 8):
        return word_gemm(x, packed, weight_scale, multiplier, bias, bits)
    (M, K), N = x.shape, packed.shape[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(), packed.contiguous().view(torch.int8)
    multiplier, bias = contiguous(multiplier), contiguous(bias)
    groups = (weight_scale if multiplier is None else multiplier).shape[1]
    if multiplier is not None and groups == 1:
        weight_scale, multiplier = weight_scale.float() * multiplier, None
    check_groups("weight_only_gemm", bits, groups, K)
    kernel = _decode_kernel if M <= DECODE_TOKENS else _prefill_kernel
    bucket, device = token_bucket(M), x.get_device()
    grouped = groups > 1 or not carries_float_sums(device)
    group_size = K // groups if groups > 1 else 0
    sizes = (N, K, bucket, bits, grouped, group_size)
    operands = (x, weight, weight_scale.contiguous(), multiplier, bias, out)
    kernel.launch(
        (device, *sizes, *dtypes(operands)),
        tiles_grid(M, N),
        *operands,
        M,
        N,
        K,
        weight.shape[1],
        groups,
        bucket,
        operand(x.dtype),
        PACKED=bits == 4,
        GROUPED=grouped,
        GROUP=group_size,
        PTX=runs_ptx(device),
    )
    return out
