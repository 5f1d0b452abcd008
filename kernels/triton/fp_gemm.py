"""fp_gemm: float tokens times floating-point codes, decoded inside; and words of 2 to 7 bits.

Every code is exact in bfloat16 and float16, so that it goes into the tensor cores as it is, and so
does E2M1 times an E4M3 scale. Other scales come after each group's sum, as in weight_only_gemm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS
from ..tuning import token_bucket
from .fp_codes import e2m1_floats, e4m3_floats, scale_values, word_floats
from .launch import (
    DECODE_TOKENS,
    Tuned,
    carries_float_sums,
    check_float,
    contiguous,
    dtypes,
    on_its_device,
    operand,
    tile,
    tiles_grid,
)
from .nibbles import columns_of, load_packed
from .tiles import add_bias_and_store, load_columns, tile_of

PREFILL_TILES = {
    "small": tile(64, 32, 4, 3, band=8, BLOCK_K=64),
    "wide": tile(128, 64, 8, 3, band=8, BLOCK_K=64),
    "square": tile(128, 128, 8, 3, band=8, BLOCK_K=64),
}
DECODE_TILES = {
    "narrow": tile(32, 16, 2, 4, BLOCK_K=64),
    "short": tile(64, 16, 4, 4, BLOCK_K=64),
    "long": tile(64, 16, 4, 4, BLOCK_K=128),
}
FINE_GROUP = 16  # columns of a group whose scale goes into the codes


def _is_even(args: dict[str, Any]) -> bool:
    width = args["K"] if args["CODES"] == "e2m1" else args["GROUP"] or args["K"]
    return bool(width % args["BLOCK_K"] == 0)


@triton.heuristics({"EVEN": _is_even})
@triton.jit
def _fp_kernel(
    x,
    weight,
    scale,
    tensor_scale,
    bias,
    out,
    M,
    N,
    K,
    row_bytes,
    groups,
    token_bucket,
    OPERAND: tl.constexpr,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """out[m, n] = Σ_g s_ng · (Σ_{k in g} x[m, k] weight[n, k]); not SCALED, s_n comes last.

    CODES: "e4m3", "e2m1" (packed) or "words" of BITS. SCALE: "float", "e8m0" or "e4m3". GROUP:
    columns that share a scale; 0 for all. EVEN: no step goes past a group of codes that are not
    packed, or past K.
    """
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    token_rows, weight_rows = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    token_pointers = x + token_rows[None, :] * K
    weight_pointers = weight + weight_rows[:, None] * row_bytes
    scale_pointers = scale + weight_rows * groups
    STEPS: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K  # a group's, of codes not packed
    steps = groups * STEPS if GROUP > 0 and CODES != "e2m1" else tl.cdiv(K, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, steps):
        if CODES == "e2m1":
            total += packed_sum(
                token_pointers,
                weight_pointers,
                scale_pointers,
                step * BLOCK_K,
                K,
                OPERAND,
                SCALE,
                GROUP,
                SCALED,
                EVEN,
                BLOCK_K,
            )
        else:
            group = step // STEPS if GROUP > 0 else 0
            k = group * GROUP + (step % STEPS if GROUP > 0 else step) * BLOCK_K
            columns = k + tl.arange(0, BLOCK_K)
            inside = columns < ((group + 1) * GROUP if GROUP > 0 else K)
            a = load_columns(token_pointers, columns[:, None], inside[:, None], EVEN).to(OPERAND)
            w = load_codes(weight_pointers, columns[None, :], inside[None, :], CODES, BITS, EVEN)
            part = tl.dot(w.to(OPERAND), a, input_precision="ieee")
            if SCALED:
                part *= group_scale(scale_pointers, group, SCALE)
            total += part
    result = tl.trans(total)
    if not SCALED:
        result *= scale_values(tl.load(scale_pointers), SCALE)[None, :]
    if tensor_scale is not None:
        result *= tl.load(tensor_scale).to(tl.float32)
    add_bias_and_store(result, bias, weight_rows, out, m, n, M, N)


@triton.jit
def load_codes(rows, columns, inside, CODES: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of codes that are not packed, as float16: every one is exact in it."""
    if CODES == "e4m3":
        codes = e4m3_floats(load_columns(rows, columns, inside, EVEN), tl.float16)
    else:
        byte, shift = columns * BITS // 8, columns * BITS % 8
        low = load_columns(rows, byte, inside, EVEN)
        high = tl.load(rows + byte + 1, mask=inside & (shift + BITS > 8), other=0)
        codes = word_floats(low, high, shift, BITS, tl.float16)
    return codes


@triton.jit
def packed_sum(
    token_pointers,
    weight_pointers,
    scale_pointers,
    k,
    K,
    OPERAND: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums over the columns k … of E2M1 codes, times their scales where SCALED."""
    FINE: tl.constexpr = GROUP % 32 != 0  # within half a block
    a, b, packed = load_packed(token_pointers, weight_pointers, k, K, BLOCK_K, EVEN)
    a, b = a.to(OPERAND), b.to(OPERAND)
    w, v = e2m1_floats(packed, OPERAND)
    if FINE:
        first, second, _ = columns_of(k, K, BLOCK_K // 2, EVEN)
        w = (w * column_scales(scale_pointers, first, K, SCALE, GROUP)).to(OPERAND)
        v = (v * column_scales(scale_pointers, second, K, SCALE, GROUP)).to(OPERAND)
    part = tl.dot(w, a, input_precision="ieee")
    group = k // GROUP if GROUP > 0 else 0
    if GROUP % 64 == 32:
        part *= group_scale(scale_pointers, group, SCALE)
        of_second = group_scale(scale_pointers, tl.minimum(k + 32, K - 1) // GROUP, SCALE)
        part += tl.dot(v, b, input_precision="ieee") * of_second
    else:
        part = tl.dot(v, b, part, input_precision="ieee")
        if SCALED and not FINE:
            part *= group_scale(scale_pointers, group, SCALE)
    return part


@triton.jit
def column_scales(scale_pointers, columns, K, SCALE: tl.constexpr, GROUP: tl.constexpr):
    """The scales of columns, float32 (rows, columns)."""
    groups = tl.minimum(columns, K - 1) // GROUP
    return scale_values(tl.load(scale_pointers[:, None] + groups[None, :]), SCALE)


@triton.jit
def group_scale(scale_pointers, group, SCALE: tl.constexpr):
    """The scales of one group, float32 (rows, 1)."""
    return scale_values(tl.load(scale_pointers + group), SCALE)[:, None]


def tiles_that_fit(
    configs: list[triton.Config], named: dict[str, Any], **settings: Any
) -> list[triton.Config]:
    """The tiles whose step does not cross a packed group; for float32 the smallest alone.

    Without tensor cores for it, a float32 product holds its operands in registers. Words are taken
    apart in registers, of which larger tiles and longer steps have too few.
    """
    if named["OPERAND"] == tl.float32:
        return configs[:1]
    if settings["CODES"] == "words":
        short = [c for c in configs if c.kwargs["BLOCK_K"] == 64]
        return [c for c in short if c.kwargs["BLOCK_M"] < 128]
    group = settings["GROUP"]
    if settings["CODES"] != "e2m1" or group % 32:
        return configs
    return [c for c in configs if c.kwargs["BLOCK_K"] == 64 or group % c.kwargs["BLOCK_K"] == 0]


_KEY = ["N", "K", "token_bucket", "CODES", "BITS", "SCALE", "GROUP", "SCALED"]
_prefill_kernel = Tuned(_fp_kernel, PREFILL_TILES, _KEY, tiles_that_fit)
_decode_kernel = Tuned(_fp_kernel, DECODE_TILES, _KEY, tiles_that_fit)


def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    codes: str,
    bits: int,
) -> Tensor:
    """x times what the codes stand for; weight: uint8 (N, bytes of a row)."""
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    groups = scale.shape[1]
    kind = "float"
    if scale.dtype == torch.uint8:
        kind = "e8m0" if tensor_scale is None else "e4m3"
    kernel = _decode_kernel if M <= DECODE_TOKENS else _prefill_kernel
    bucket, device = token_bucket(M), x.get_device()
    group_size = K // groups if groups > 1 else 0
    scaled = groups > 1 or not carries_float_sums(device)
    form = (codes, bits, kind, group_size, scaled)
    of_tensor = tensor_scale if kind == "e4m3" else None
    operands = (x.contiguous(), weight, scale.contiguous(), of_tensor, contiguous(bias), out)
    kernel.launch(
        (device, N, K, bucket, *form, *dtypes(operands)),
        tiles_grid(M, N),
        *operands,
        M,
        N,
        K,
        weight.shape[1],
        groups,
        bucket,
        operand(x.dtype),
        CODES=codes,
        BITS=bits,
        SCALE=kind,
        GROUP=group_size,
        SCALED=scaled,
    )
    return out


@on_its_device
def fp_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    element: str,
) -> Tensor:
    """As `reference.fp_gemm`, summed in float32.

    Raises NotImplementedError for E2M1 in groups that do not fit the packed blocks; of 16 columns
    E4M3 scales fit.
    """
    check_float(x, "fp_gemm")
    groups, columns = scale.shape[1], x.shape[1]
    size, in_codes = columns // groups, scale.dtype == torch.uint8 and tensor_scale is not None
    if element == "e2m1" and groups > 1 and size % 32 and not (in_codes and size == FINE_GROUP):
        raise NotImplementedError(
            f"fp_gemm: E2M1 groups of {size} columns do not fit the packed blocks; groups of 32, "
            f"64, … do, and of {FINE_GROUP} with E4M3 scales"
        )
    weight = packed.contiguous().view(torch.int8 if element == "e2m1" else torch.uint8)
    return _product(x, weight, scale, tensor_scale, bias, element, FORMATS[element].bits)


def word_gemm(
    x: Tensor,
    words: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """As `reference.weight_only_gemm` for codes in words, summed in float32."""
    scale = weight_scale if multiplier is None else weight_scale.float() * multiplier
    weight = words.contiguous().view(torch.uint8)
    return _product(x, weight, scale, None, bias, "words", bits)
