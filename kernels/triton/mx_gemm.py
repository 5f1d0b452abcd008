"""mx_gemm and mx_quantize: MXFP8 and MXFP4 codes on both sides, on tensor cores that scale them.

Codes and E8M0 bytes go in as they are stored. Only the order of E2M1 codes differs: a stored byte
of a weight holds columns of two groups, 32 apart, and the tensor cores take two of one group. So a
tile is put together from bytes 16 apart, and tokens are packed likewise: columns j and j + 16 of a
group share a byte. The order within a group changes no sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import MX_GROUP, QuantizedInput
from ..tuning import token_bucket
from .fp_codes import e2m1_codes, e4m3_codes, rounded_and_scale
from .launch import (
    DECODE_TOKENS,
    Tuned,
    check_float,
    contiguous,
    dtypes,
    next_power_of_2,
    on_its_device,
    registered,
    row_count,
    row_warps,
    tile,
    tiles_grid,
)
from .tiles import add_bias_and_store, load_columns, tile_of

PREFILL_TILES = {
    "wide": tile(128, 64, 4, 3, band=8, BLOCK_K=128),
    "square": tile(128, 128, 8, 3, band=8, BLOCK_K=128),
}
DECODE_TILES = {"tall": tile(128, 16, 4, 4, BLOCK_K=128)}


@triton.heuristics({"EVEN": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def _mx_kernel(
    codes,
    scale,
    weight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K,
    token_bucket,
    ELEMENT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_k codes[m, k] weight[n, k], each group of 32 times its scales, + bias[n]."""
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    # Rows past the end repeat the last one: they are computed and never stored.
    token_rows, weight_rows = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    SHARE: tl.constexpr = 2 if ELEMENT == "e2m1" else 1  # codes a byte
    row_bytes = K // SHARE
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        groups = tl.minimum((k + tl.arange(0, BLOCK_K // 32) * 32), K - 32) // 32
        of_rows = tl.load(weight_scale + weight_rows[:, None] * (K // 32) + groups[None, :])
        of_tokens = tl.load(scale + token_rows[:, None] * (K // 32) + groups[None, :])
        columns = k // SHARE + tl.arange(0, BLOCK_K // SHARE)
        inside = columns < row_bytes
        token_pointers = codes + token_rows[None, :] * row_bytes
        a = load_columns(token_pointers, columns[:, None], inside[:, None], EVEN)
        if ELEMENT == "e2m1":
            w = pairs_of_groups(weight + weight_rows * row_bytes, k // 2, row_bytes, EVEN, BLOCK_K)
        else:
            weight_pointers = weight + weight_rows[:, None] * row_bytes
            w = load_columns(weight_pointers, columns[None, :], inside[None, :], EVEN)
        total = tl.dot_scaled(w, of_rows, ELEMENT, a, of_tokens, ELEMENT, total)
    result = tl.trans(total)
    add_bias_and_store(result, bias, weight_rows, out, m, n, M, N)


@triton.jit
def pairs_of_groups(rows, first, row_bytes, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """E2M1 codes from a byte on, two of one group a byte: uint8 (rows, BLOCK_K / 2).

    rows: pointers to the packed rows. A block of 32 bytes has one group in its low halves, and the
    next one in its high halves.
    """
    blocks = first + tl.arange(0, BLOCK_K // 64) * 32
    columns = blocks[None, :, None] + tl.arange(0, 16)[None, None, :]
    inside = columns < row_bytes
    low = load_columns(rows[:, None, None], columns, inside, EVEN)
    high = load_columns(rows[:, None, None], columns + 16, inside, EVEN)
    pairs = tl.join((low & 15) | (high << 4), (low >> 4) | (high & 0xF0))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [rows.shape[0], BLOCK_K // 2])


_KEY = ["N", "K", "token_bucket", "ELEMENT"]
_prefill_kernel = Tuned(_mx_kernel, PREFILL_TILES, _KEY)
_decode_kernel = Tuned(_mx_kernel, DECODE_TILES, _KEY)


@on_its_device
def mx_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    element: str,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.mx_gemm`, summed in float32."""
    M, (N, K) = codes.shape[0], (weight.shape[0], weight_scale.shape[1] * MX_GROUP)
    out = torch.empty(M, N, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    kernel = _decode_kernel if M <= DECODE_TOKENS else _prefill_kernel
    bucket, device = token_bucket(M), codes.get_device()
    tensors = (codes, scale, weight, weight_scale)
    operands = (*(tensor.contiguous() for tensor in tensors), contiguous(bias), out)
    form = (device, N, K, bucket, element, *dtypes(operands))
    kernel.launch(form, tiles_grid(M, N), *operands, M, N, K, bucket, ELEMENT=element)
    return out


@triton.jit
def _mx_quantize_kernel(
    x,
    codes,
    scales,
    K,
    ELEMENT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    columns = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    values = tl.load(x + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    rounded, scale = rounded_and_scale(values, 1.0, ELEMENT, "e8m0")
    exponents = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    tl.store(scales + row * (K // 32) + group, exponents, mask=group < K // 32)
    if ELEMENT == "e2m1":
        halves = tl.permute(tl.reshape(e2m1_codes(rounded), [GROUPS, 2, 16]), (0, 2, 1))
        low, high = tl.split(halves)
        places = group[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(codes + row * (K // 2) + places, low | (high << 4), mask=places < K // 2)
    else:
        tl.store(codes + row * K + columns, e4m3_codes(rounded), mask=columns < K)


def _codes_and_scale(x: Tensor, element: str) -> tuple[Tensor, Tensor]:
    shape, width = x.shape[:-1], x.shape[-1]
    row_bytes = width // 2 if element == "e2m1" else width
    codes = torch.empty(*shape, row_bytes, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(*shape, width // MX_GROUP, dtype=torch.uint8, device=x.device)


@registered("mx_quantize", _codes_and_scale)
def _mx_quantize(x: Tensor, element: str) -> tuple[Tensor, Tensor]:
    check_float(x, "mx_quantize")
    codes, scale = _codes_and_scale(x, element)
    if x.numel():
        groups = next_power_of_2(x.shape[-1] // MX_GROUP)
        warps = row_warps(groups * MX_GROUP, x.get_device())
        kernel = _mx_quantize_kernel[(row_count(x),)]
        kernel(x.contiguous(), codes, scale, x.shape[-1], element, groups, num_warps=warps)
    return codes, scale


def mx_quantize(x: Tensor, element: str) -> QuantizedInput:
    """As `reference.mx_quantize`."""
    return QuantizedInput(*_mx_quantize(x, element))
