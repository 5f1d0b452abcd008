"""int8_gemm and int4_gemm: one loop of pure integers; only how a weight's tile is read differs.

The weight is the left operand, so that a 4-bit tile is unpacked in registers and goes from there
into the tensor cores (Hopper's take their left operand from registers, their right one from shared
memory only). The tile of results is therefore (out_features, tokens), turned over when stored.

Few tokens make too few tiles to keep a GPU's memory busy: then K is split over several programs,
which leave their int32 sums for a second small kernel to add and scale. Integer sums do not depend
on the order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import token_bucket
from .launch import (
    DECODE_TOKENS,
    Tuned,
    cdiv,
    contiguous,
    dtypes,
    most_tokens,
    multiprocessors,
    next_power_of_2,
    on_its_device,
    packed_tokens,
    runs_ptx,
    tile,
)
from .nibbles import load_packed, shifted, times_multipliers
from .tiles import load_columns, scale_and_store, tile_of

MOST_SPLITS = 16
DECODE_ROWS = 64  # of a weight, a program: what the number of splits is reckoned with

PREFILL_TILES = {
    "small": tile(64, 64, 4, 3, band=8, BLOCK_K=64),
    "wide": tile(128, 64, 4, 3, band=8, BLOCK_K=128),
    "square": tile(128, 128, 4, 4, band=8, BLOCK_K=64),
    "deep": tile(128, 128, 8, 3, band=8, BLOCK_K=128),
    "large": tile(128, 256, 8, 3, band=8, BLOCK_K=64),
    "large, deep": tile(128, 256, 8, 3, band=8, BLOCK_K=128),
}
DECODE_TILES = {
    "plain": tile(64, 16, 4, 5, BLOCK_K=64),
    "short": tile(64, 16, 4, 4, BLOCK_K=128),
    "long": tile(64, 16, 4, 4, BLOCK_K=256),
    "narrow": tile(32, 16, 2, 5, BLOCK_K=256),
    "tall": tile(128, 16, 4, 4, BLOCK_K=128),
}


@triton.jit
def integer_sums(
    token_pointers,
    weight_pointers,
    multipliers,
    first,
    step,
    K,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_k codes[m, k] w[n, k] over the columns from `first` on, one BLOCK_K of each `step`: int32.

    token_pointers: to the first column, (1, BLOCK_M); weight_pointers: (BLOCK_N, 1); multipliers:
    to those of each row of the weight, (BLOCK_N,), or None.
    """
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k in range(first, K, step):
        if PACKED:
            a, b, packed = load_packed(token_pointers, weight_pointers, k, K, BLOCK_K, EVEN_K)
            if multipliers is None:
                w, v = shifted(packed, PTX)
            else:  # each half lies within one group, as `tiles_that_fit` sees to
                group_first = tl.load(multipliers + (k // GROUP if GROUP > 0 else 0)).to(tl.int32)
                group_second = group_first
                if GROUP % 64 != 0:
                    second = multipliers + tl.minimum(k + 32, K - 1) // GROUP
                    group_second = tl.load(second).to(tl.int32)
                w, v = times_multipliers(packed, group_first, group_second, PTX)
            total = tl.dot(w, a, total, out_dtype=tl.int32)
            total = tl.dot(v, b, total, out_dtype=tl.int32)
        else:
            columns = k + tl.arange(0, BLOCK_K)
            inside = columns < K
            a = load_columns(token_pointers, columns[:, None], inside[:, None], EVEN_K)
            w = load_columns(weight_pointers, columns[None, :], inside[None, :], EVEN_K)
            total = tl.dot(w, a, total, out_dtype=tl.int32)
    return total


@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def _integer_kernel(
    codes,
    scale,
    weight,
    weight_scale,
    multiplier,
    bias,
    out,
    M,
    N,
    K,
    row_bytes,
    scale_stride,
    groups,
    token_bucket,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_k codes[m, k] w[n, k], scaled; or with SPLIT_K the int32 sums of a part.

    GROUP: columns that share a multiplier; 0 for all.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    # Rows past the end repeat the last one: they are computed and never stored.
    token_rows, weight_rows = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    token_pointers = codes + token_rows[None, :] * K
    weight_pointers = weight + weight_rows[:, None] * row_bytes
    split = tl.program_id(1)
    multipliers = None
    if multiplier is not None:
        multipliers = multiplier + weight_rows * groups
    total = integer_sums(
        token_pointers,
        weight_pointers,
        multipliers,
        split * BLOCK_K,
        BLOCK_K * SPLIT_K,
        K,
        PACKED,
        GROUP,
        EVEN_K,
        PTX,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
    )
    if SPLIT_K == 1:
        factor = 0.0625 if PACKED and multiplier is None else 1.0
        scale_and_store(total, scale, scale_stride, weight_scale, bias, out, m, n, M, N, factor)
    else:
        inside = (m < M)[:, None] & (n < N)[None, :]
        pointers = out + (split.to(tl.int64) * M + m[:, None]) * N + n[None, :]
        tl.store(pointers, tl.trans(total), mask=inside)


@triton.jit
def _add_splits_kernel(
    parts,
    scale,
    weight_scale,
    bias,
    out,
    M,
    N,
    scale_stride,
    SHIFTED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (m < M)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for split in tl.static_range(SPLIT_K):
        rows = m + split * M
        total += tl.load(parts + rows[None, :] * N + n[:, None], mask=inside, other=0)
    factor = 0.0625 if SHIFTED else 1.0
    scale_and_store(total, scale, scale_stride, weight_scale, bias, out, m, n, M, N, factor)


def tiles_that_fit(
    configs: list[triton.Config], named: dict[str, Any], **settings: Any
) -> list[triton.Config]:
    """The tiles that fit the registers, and whose step of K does not cross a multiplier's group."""
    tokens = most_tokens(named["out"])
    group = settings["GROUP"] if named["multiplier"] is not None else 0
    return [
        config
        for config in configs
        if config.kwargs["BLOCK_M"] <= tokens
        and (config.kwargs["BLOCK_K"] == 64 or group % config.kwargs["BLOCK_K"] == 0)
    ]


_KEY = ["N", "K", "token_bucket", "PACKED", "GROUP", "SPLIT_K"]
_prefill_kernel = Tuned(_integer_kernel, PREFILL_TILES, _KEY, tiles_that_fit)
_decode_kernel = Tuned(_integer_kernel, DECODE_TILES, _KEY, tiles_that_fit)


@lru_cache(maxsize=4096)
def splits(device: torch.device, tokens: int, rows: int, width: int) -> int:
    """Into how many parts K is split: enough programs for every multiprocessor to have four."""
    if tokens > DECODE_TOKENS:
        return 1
    wanted = cdiv(4 * multiprocessors(device), cdiv(rows, DECODE_ROWS))
    longest = max(width // 512, 1)  # a part of less than 512 columns is not worth a program
    return min(next_power_of_2(wanted), _power_below(longest), MOST_SPLITS)


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def integer_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    packed: bool,
) -> Tensor:
    """Either product: weight int8 (N, K), or packed, uint8 (N, ⌈K/2⌉).

    Raises NotImplementedError for groups that do not fit the packed blocks: see `packed_tokens`.
    """
    (M, K), N = codes.shape, weight.shape[0]
    out = torch.empty(M, N, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    codes, weight, scale = codes.contiguous(), weight.contiguous(), scale.contiguous()
    weight_scale, multiplier, bias = (
        weight_scale.contiguous(),
        contiguous(multiplier),
        contiguous(bias),
    )
    if packed:
        weight = weight.view(torch.int8)
    groups = 1 if multiplier is None else multiplier.shape[1]
    if groups > 1 and not packed_tokens("int4_gemm", K // groups):
        raise NotImplementedError(
            f"int4_gemm: groups of {K // groups} columns do not fit the packed blocks; unpack the "
            "weight and use int8_gemm"
        )
    group_size = K // groups if groups > 1 else 0
    scale_stride = 0 if scale.numel() == 1 else 1
    parts = splits(codes.device, M, N, K)
    sums, sums_bias = out, bias
    if parts > 1:  # the bias is added with the parts; its dtype would be a kernel of its own
        sums = torch.empty(parts, M, N, dtype=torch.int32, device=codes.device)
        sums_bias = None
    kernel = _decode_kernel if M <= DECODE_TOKENS else _prefill_kernel
    bucket, device = token_bucket(M), codes.get_device()
    sizes = (N, K, bucket, packed, group_size, parts)
    operands = (codes, scale, weight, weight_scale, multiplier, sums_bias, sums)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return cdiv(M, meta["BLOCK_M"]) * cdiv(N, meta["BLOCK_N"]), parts

    kernel.launch(
        (device, *sizes, *dtypes(operands)),
        grid,
        *operands,
        M,
        N,
        K,
        weight.shape[1],
        scale_stride,
        groups,
        bucket,
        PACKED=packed,
        GROUP=group_size,
        SPLIT_K=parts,
        PTX=runs_ptx(device),
    )
    if parts > 1:
        _add_splits_kernel.run(
            sums,
            scale,
            weight_scale,
            bias,
            out,
            M,
            N,
            scale_stride,
            packed and multiplier is None,
            parts,
            next_power_of_2(M),
            128,
            num_warps=4,
            grid=(cdiv(N, 128),),
            warmup=False,
        )
    return out


@on_its_device
def int8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int8_gemm`, the scaling in float32."""
    return integer_gemm(codes, scale, weight, weight_scale, None, bias, dtype, packed=False)


@on_its_device
def int4_gemm(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int4_gemm`, the scaling in float32."""
    return integer_gemm(codes, scale, packed, weight_scale, multiplier, bias, dtype, packed=True)
