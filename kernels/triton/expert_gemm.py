"""expert_gemm: the products of all experts of a layer in one launch.

A program finds its expert from where the experts' rows end, so that the host need not know; there
are as many programs as any shares of the rows can need, and those that are left over end at once.
Weights lie where they are: a table holds their addresses.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import token_bucket
from .integer_gemm import DECODE_TILES, PREFILL_TILES, integer_sums, tiles_that_fit
from .launch import (
    DECODE_TOKENS,
    Grid,
    Tuned,
    cdiv,
    next_power_of_2,
    on_its_device,
    packed_tokens,
    runs_ptx,
)
from .tiles import scale_and_store


@triton.jit
def address_of(table, expert, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that a table has of an expert. ALIGNED: it is a multiple of 16 bytes."""
    address = tl.load(table + expert).to(tl.pointer_type(kind))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def expert_of(tile, ends, experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile of rows: its expert, its first row, and where the expert's rows end.

    The tiles of an expert are those of its rows, BLOCK_M each. A tile behind the last is of expert
    `experts`.
    """
    every = tl.arange(0, BLOCK_E)
    end = tl.load(ends + every, mask=every < experts, other=0)
    begin = tl.load(ends + every - 1, mask=(every > 0) & (every < experts), other=0)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    first_tile = tl.sum(tl.where(every < expert, tiles, 0), 0)
    first = tl.sum(tl.where(every == expert, begin, 0), 0)
    last = tl.sum(tl.where(every == expert, end, 0), 0)
    return expert, first + (tile - first_tile) * BLOCK_M, last


@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def _expert_kernel(
    codes,
    scale,
    ends,
    weights,
    weight_scales,
    multiplier,
    biases,
    bias_like,
    out,
    N,
    K,
    row_bytes,
    scale_stride,
    groups,
    experts,
    token_bucket,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_k codes[m, k] w[n, k], scaled, where w is the weight of row m's expert.

    weights, weight_scales, multiplier, biases: tables of addresses, the last two or None;
    bias_like: one of the biases.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert, first, last = expert_of(tile, ends, experts, BLOCK_E, BLOCK_M)
    if expert < experts:
        m = first + tl.arange(0, BLOCK_M)
        n = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end repeat the last one: they are computed and never stored.
        token_rows, weight_rows = tl.minimum(m, last - 1), tl.minimum(n, N - 1)
        weight = address_of(weights, expert, tl.int8, ALIGNED)
        multipliers = None
        if multiplier is not None:
            multipliers = address_of(multiplier, expert, tl.int8, ALIGNED) + weight_rows * groups
        total = integer_sums(
            codes + token_rows[None, :] * K,
            weight + weight_rows[:, None] * row_bytes,
            multipliers,
            0,
            BLOCK_K,
            K,
            PACKED,
            GROUP,
            EVEN_K,
            PTX,
            BLOCK_N,
            BLOCK_M,
            BLOCK_K,
        )
        factor = 0.0625 if PACKED and multiplier is None else 1.0
        row_scale = address_of(weight_scales, expert, tl.float32, ALIGNED)
        bias = None
        if biases is not None:
            bias = address_of(biases, expert, bias_like.dtype.element_ty, ALIGNED)
        scale_and_store(total, scale, scale_stride, row_scale, bias, out, m, n, last, N, factor)


_KEY = ["N", "K", "token_bucket", "PACKED", "GROUP", "BLOCK_E", "ALIGNED"]
# An expert has a share of a prompt's tokens, and the search for it takes registers: of the wide
# tiles Hopper's alone fit (with multipliers of groups "wide" spills on Ampere).
_PREFILL_TILES = {name: PREFILL_TILES[name] for name in ("small", "large")}
_prefill_kernel = Tuned(_expert_kernel, _PREFILL_TILES, _KEY, tiles_that_fit)
_decode_kernel = Tuned(_expert_kernel, DECODE_TILES, _KEY, tiles_that_fit)


@lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as a tensor on a device; what is at them may change."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def tables_of(
    columns: Iterable[list[Tensor]], device: torch.device
) -> tuple[list[Tensor | None], bool]:
    """A table of each list's addresses, None for an empty one; whether all are multiples of 16.

    The tensors must live until the kernel has been launched.
    """
    addresses = [tuple(tensor.data_ptr() for tensor in column) for column in columns]
    aligned = all(address % 16 == 0 for column in addresses for address in column)
    return [_table(column, device) if column else None for column in addresses], aligned


def grid_of(rows: int, N: int, experts: int) -> Grid:
    """As many programs as any shares of the rows can need."""

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = cdiv(rows, meta["BLOCK_M"]) + min(rows, experts)
        return (tiles * cdiv(N, meta["BLOCK_N"]),)

    return grid


@on_its_device
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
    """As `reference.expert_gemm`, the scaling in float32; all weights packed, or none.

    Raises NotImplementedError for packed weights beside others, and for groups that do not fit the
    packed blocks: see `packed_tokens`.
    """
    (R, K), N, device = codes.shape, weights[0].shape[0], codes.device
    out = torch.zeros(R, N, dtype=dtype, device=device)
    if out.numel() == 0 or K == 0:
        return out
    kinds = {weight.dtype for weight in weights}
    packed = torch.uint8 in kinds
    if len(kinds) > 1:
        raise NotImplementedError("expert_gemm: packed weights stand beside int8 ones")
    codes, scale, ends = codes.contiguous(), scale.contiguous(), ends.contiguous()
    # A copy must live until the kernel has been launched: these lists keep it.
    weights, weight_scales, multipliers, biases = (
        [tensor.contiguous() for tensor in tensors]
        for tensors in (weights, weight_scales, multipliers if packed else [], biases)
    )
    groups = multipliers[0].shape[1] if multipliers else 1
    if groups > 1 and not packed_tokens("int4_gemm", K // groups):
        raise NotImplementedError(
            f"expert_gemm: groups of {K // groups} columns do not fit the packed blocks; unpack "
            "the weights"
        )
    group_size, experts = K // groups if groups > 1 else 0, len(weights)
    tables, aligned = tables_of((weights, weight_scales, multipliers, biases), device)
    like = biases[0] if biases else None
    share = max(1, R // experts)
    kernel = _decode_kernel if share <= DECODE_TOKENS else _prefill_kernel
    bucket, index, block = token_bucket(share), codes.get_device(), next_power_of_2(experts)

    forms = (aligned, out.dtype, None if like is None else like.dtype, bool(multipliers))
    kernel.launch(
        (index, N, K, bucket, packed, group_size, block, *forms),
        grid_of(R, N, experts),
        codes,
        scale,
        ends,
        *tables,
        like,
        out,
        N,
        K,
        weights[0].shape[1],
        0 if scale.numel() == 1 else 1,
        groups,
        experts,
        bucket,
        PACKED=packed,
        GROUP=group_size,
        BLOCK_E=block,
        ALIGNED=aligned,
        PTX=runs_ptx(index),
    )
    return out
