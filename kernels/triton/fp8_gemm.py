"""fp8_gemm: E4M3 codes times E4M3 codes on tensor cores that multiply them; scales come after.

Groups of columns scale their own sum, in float32; otherwise the scales come last.

Hopper's tensor cores add in fewer bits than float32 has. `max_num_imprecise_acc=32`, the least with
which Triton multiplies FP8 there, has the sum of each instruction's 32 products alone added so, and
these sums added in float32. Of other chips float32 sums are asked for by the type alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import token_bucket
from .launch import (
    DECODE_TOKENS,
    Tuned,
    contiguous,
    dtypes,
    on_its_device,
    tile,
    tiles_grid,
)
from .tiles import add_bias_and_store, scale_and_store, tile_of

PREFILL_TILES = {
    "small": tile(64, 32, 4, 3, band=8, BLOCK_K=128),
    "wide": tile(128, 64, 8, 3, band=8, BLOCK_K=128),
    "square": tile(128, 128, 8, 3, band=8, BLOCK_K=128),
}
DECODE_TILES = {
    "short": tile(64, 16, 4, 4, BLOCK_K=128),
    "tall": tile(128, 16, 4, 4, BLOCK_K=128),
}
STEP = 128  # columns: every tile's, which a group is a multiple of


@triton.heuristics({"EVEN": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def _fp8_kernel(
    codes,
    scale,
    weight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K,
    scale_stride,
    token_bucket,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_g s_mg · t_ng · (Σ_{k in g} codes[m, k] weight[n, k]) + bias[n].

    GROUP: columns that share a scale, on both sides; 0 for all.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    # Rows past the end repeat the last one: they are computed and never stored.
    token_rows, weight_rows = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    token_pointers = codes + token_rows[None, :] * K
    weight_pointers = weight + weight_rows[:, None] * K
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < K
        a = load_codes(token_pointers, columns[:, None], inside[:, None], EVEN)
        w = load_codes(weight_pointers, columns[None, :], inside[None, :], EVEN)
        if GROUP > 0:
            part = tl.dot(w, a, max_num_imprecise_acc=32)
            of_tokens = tl.load(scale + token_rows * (K // GROUP) + k // GROUP)
            of_rows = tl.load(weight_scale + weight_rows * (K // GROUP) + k // GROUP)
            total += part * of_tokens[None, :] * of_rows.to(tl.float32)[:, None]
        else:
            total = tl.dot(w, a, total, max_num_imprecise_acc=32)
    if GROUP > 0:
        result = tl.trans(total)
        add_bias_and_store(result, bias, weight_rows, out, m, n, M, N)
    else:
        scale_and_store(total, scale, scale_stride, weight_scale, bias, out, m, n, M, N, 1.0)


@triton.jit
def load_codes(rows, columns, inside, EVEN: tl.constexpr):
    """As `load_columns`, of a dtype that no integer is converted to."""
    return tl.load(rows + columns) if EVEN else tl.load(rows + columns, mask=inside, other=0.0)


def tiles_that_fit(
    configs: list[triton.Config], named: dict[str, Any], **settings: Any
) -> list[triton.Config]:
    """The tiles that fit the registers: with groups a step's sum and the tokens' scales besides."""
    if settings["GROUP"] == 0:
        return configs
    return [c for c in configs if c.kwargs["BLOCK_M"] < 128]


_KEY = ["N", "K", "token_bucket", "GROUP"]
_prefill_kernel = Tuned(_fp8_kernel, PREFILL_TILES, _KEY, tiles_that_fit)
_decode_kernel = Tuned(_fp8_kernel, DECODE_TILES, _KEY, tiles_that_fit)


@on_its_device
def fp8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.fp8_gemm`, each group's sum scaled in float32.

    Raises NotImplementedError for groups that are no multiple of 128 columns.
    """
    (M, K), N = codes.shape, weight.shape[0]
    out = torch.empty(M, N, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    groups = weight_scale.shape[1]
    group_size = K // groups if groups > 1 else 0
    if group_size % STEP:
        raise NotImplementedError(
            f"fp8_gemm: groups of {group_size} columns are no multiple of {STEP}; fp_gemm takes "
            "the values of such codes"
        )
    scale_stride = 0 if scale.numel() == 1 else 1
    kernel = _decode_kernel if M <= DECODE_TOKENS else _prefill_kernel
    bucket, device = token_bucket(M), codes.get_device()
    operands = (
        codes.contiguous().view(torch.float8_e4m3fn),
        scale.contiguous(),
        weight.contiguous().view(torch.float8_e4m3fn),
        weight_scale.contiguous(),
        contiguous(bias),
        out,
    )
    kernel.launch(
        (device, N, K, bucket, group_size, *dtypes(operands)),
        tiles_grid(M, N),
        *operands,
        M,
        N,
        K,
        scale_stride,
        bucket,
        GROUP=group_size,
    )
    return out
