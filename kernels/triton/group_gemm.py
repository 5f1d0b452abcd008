"""group_gemm: float scales by block of K, an integer product within each block.

Between two steps of K the block's int32 sums are converted, scaled and added in float32: work for
the tile of results that the plain product does not have. Codes in another order meet the weight's
columns in that order, gathered once a sequence before the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import token_bucket
from .launch import (
    Tuned,
    cdiv,
    contiguous,
    dtypes,
    next_power_of_2,
    on_its_device,
    tile,
    tiles_grid,
)
from .tiles import add_bias_and_store, tile_of

LONGEST_STEP, SHORTEST_STEP = 128, 32  # columns a step; tensor cores take 32 bytes at least

TILES = {
    "small": tile(64, 32, 4, 3, band=8),
    "wide": tile(128, 64, 4, 3, band=8),
    "square": tile(128, 128, 8, 3, band=8),
    "decode": tile(32, 16, 2, 4),
}


@triton.jit
def _group_kernel(
    codes,
    scale,
    block_scale,
    weight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K,
    scale_stride,
    token_bucket,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BAND: tl.constexpr,
):
    """One sequence: out[m, n] = scale[m] · Σ_g c_g · s_ng · (Σ_{k in g} codes[m, k] w[n, k])."""
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    token_rows, weight_rows = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    token_pointers = codes + token_rows[None, :] * K
    weight_pointers = weight + weight_rows[:, None] * K
    scale_pointers = weight_scale + weight_rows * (K // GROUP if GROUPED else 1)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, (K // GROUP) * STEPS):
        group = step // STEPS
        k = group * GROUP + (step % STEPS) * BLOCK_K
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < (group + 1) * GROUP
        a = tl.load(token_pointers + columns[:, None], mask=inside[:, None], other=0)
        w = tl.load(weight_pointers + columns[None, :], mask=inside[None, :], other=0)
        part = tl.dot(w, a, out_dtype=tl.int32).to(tl.float32)
        factor = 1.0
        if block_scale is not None:
            factor = tl.load(block_scale + group)
        if GROUPED:
            total += part * (tl.load(scale_pointers + group).to(tl.float32) * factor)[:, None]
        else:
            total += part * factor
    result = tl.trans(total) * tl.load(scale + token_rows * scale_stride)[:, None]
    if not GROUPED:
        result *= tl.load(scale_pointers).to(tl.float32)[None, :]
    add_bias_and_store(result, bias, weight_rows, out, m, n, M, N)


_kernel = Tuned(_group_kernel, TILES, ["N", "K", "token_bucket", "GROUPED", "GROUP"])


def step_of(group_size: int) -> int:
    """Columns a step of the loop: a power of two that covers the group, or part of it."""
    return min(max(next_power_of_2(group_size), SHORTEST_STEP), LONGEST_STEP)


@on_its_device
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
    (batch, length, K), N = codes.shape, weight.shape[0]
    out = torch.empty(batch, length, N, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    codes, weight_scale, bias = codes.contiguous(), weight_scale.contiguous(), contiguous(bias)
    per_token = scale.numel() > 1
    scale = scale.expand(batch, length, 1).contiguous() if per_token else scale.contiguous()
    block_k, grouped = step_of(group_size), weight_scale.shape[1] > 1
    steps, device = cdiv(group_size, block_k), codes.get_device()

    def multiply(sequences: slice, tokens: int, columns: Tensor, blocks: Tensor | None) -> None:
        operands = (
            codes[sequences],
            scale[sequences] if per_token else scale,
            blocks,
            columns,
            weight_scale,
            bias,
            out[sequences],
        )
        bucket = token_bucket(tokens)
        _kernel.launch(
            (device, N, K, bucket, grouped, group_size, *dtypes(operands)),
            tiles_grid(tokens, N),
            *operands,
            tokens,
            N,
            K,
            int(per_token),
            bucket,
            GROUPED=grouped,
            GROUP=group_size,
            STEPS=steps,
            BLOCK_K=block_k,
        )

    if block_scale is None and order is None:
        multiply(slice(None), batch * length, weight.contiguous(), None)
        return out
    for b in range(batch):
        columns = weight if order is None else weight.index_select(1, order[b])
        blocks = None if block_scale is None else block_scale[b].contiguous()
        multiply(slice(b, b + 1), length, columns.contiguous(), blocks)
    return out
