"""expert_weight_only_gemm: float tokens times the packed weights of their experts, in one launch.

The loop is that of `weight_only_gemm`; which expert a program is for, and where its weight lies, is
found as in `expert_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuning import token_bucket
from .expert_gemm import address_of, expert_of, grid_of, tables_of
from .launch import (
    DECODE_TOKENS,
    Tuned,
    carries_float_sums,
    check_float,
    next_power_of_2,
    on_its_device,
    operand,
    runs_ptx,
)
from .weight_only_gemm import (
    DECODE_TILES,
    PREFILL_TILES,
    check_groups,
    float_sums,
    store_sums,
    tiles_that_fit,
)


@triton.heuristics({"EVEN": lambda args: (args["GROUP"] or args["K"]) % args["BLOCK_K"] == 0})
@triton.jit
def _expert_weight_only_kernel(
    x,
    ends,
    weights,
    weight_scales,
    scale_like,
    multipliers,
    biases,
    bias_like,
    out,
    N,
    K,
    row_bytes,
    groups,
    experts,
    token_bucket,
    OPERAND: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_g s_ng · (Σ_{k in g} x[m, k] w[n, k]), w and s those of row m's expert.

    weights, weight_scales, multipliers, biases: tables of addresses, the last two or None;
    scale_like, bias_like: one of the scales, and of the biases.
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
        weight_scale = address_of(weight_scales, expert, scale_like.dtype.element_ty, ALIGNED)
        multiplier, bias = None, None
        if multipliers is not None:
            multiplier = address_of(multipliers, expert, tl.int8, ALIGNED)
        if biases is not None:
            bias = address_of(biases, expert, bias_like.dtype.element_ty, ALIGNED)
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
        store_sums(total, weight_scale, bias, weight_rows, out, m, n, last, N, GROUPED)


_KEY = ["N", "K", "token_bucket", "PACKED", "GROUPED", "GROUP", "BLOCK_E", "ALIGNED"]
# The search for an expert takes registers: with scales of groups "square" spills on Ampere.
_PREFILL_TILES = {name: PREFILL_TILES[name] for name in ("small", "wide")}
# The first is that of float32, for which those of few tokens spill.
_DECODE_TILES = {"small": PREFILL_TILES["small"], **DECODE_TILES}
_prefill_kernel = Tuned(_expert_weight_only_kernel, _PREFILL_TILES, _KEY, tiles_that_fit)
_decode_kernel = Tuned(_expert_weight_only_kernel, _DECODE_TILES, _KEY, tiles_that_fit)


@on_its_device
def expert_weight_only_gemm(
    x: Tensor,
    ends: Tensor,
    packed: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    bits: int,
) -> Tensor:
    """As `reference.expert_weight_only_gemm`, summed in float32.

    Raises NotImplementedError for 4-bit groups that do not fit the packed blocks: `packed_tokens`.
    """
    check_float(x, "expert_weight_only_gemm")
    (R, K), N, experts = x.shape, packed[0].shape[0], len(packed)
    out = x.new_zeros(R, N)
    if out.numel() == 0 or K == 0:
        return out
    x, ends = x.contiguous(), ends.contiguous()
    # A copy must live until the kernel has been launched: these lists keep it.
    weights, weight_scales, multipliers, biases = (
        [tensor.contiguous() for tensor in tensors]
        for tensors in (packed, weight_scales, multipliers, biases)
    )
    groups = (multipliers or weight_scales)[0].shape[1]
    check_groups("expert_weight_only_gemm", bits, groups, K)
    tables, aligned = tables_of((weights, weight_scales, multipliers, biases), x.device)
    weight_table, scale_table, multiplier_table, bias_table = tables
    scale_like, bias_like = weight_scales[0], biases[0] if biases else None
    share = max(1, R // experts)
    kernel = _decode_kernel if share <= DECODE_TOKENS else _prefill_kernel
    bucket, device, block = token_bucket(share), x.get_device(), next_power_of_2(experts)
    grouped = groups > 1 or bool(multipliers) or not carries_float_sums(device)
    group_size = K // groups if groups > 1 else 0
    forms = (x.dtype, scale_like.dtype, None if bias_like is None else bias_like.dtype, aligned)
    kernel.launch(
        (device, N, K, bucket, bits, grouped, group_size, block, bool(multipliers), *forms),
        grid_of(R, N, experts),
        x,
        ends,
        weight_table,
        scale_table,
        scale_like,
        multiplier_table,
        bias_table,
        bias_like,
        out,
        N,
        K,
        weights[0].shape[1],
        groups,
        experts,
        bucket,
        operand(x.dtype),
        PACKED=bits == 4,
        GROUPED=grouped,
        GROUP=group_size,
        BLOCK_E=block,
        ALIGNED=aligned,
        PTX=runs_ptx(device),
    )
    return out
