"""Attention over rows of quantized keys and values, and the rows themselves.

One kernel serves prefill and decoding, float and int8 first products. A program takes the queries
of one key/value head, as many as fit its tile (the query heads that share it side by side), and
walks through the tokens once, with the softmax kept up as it goes (FlashAttention, arXiv
2205.14135); codes are unpacked in registers, so that the cache is read at the bytes that it takes.
Few queries make too few programs: then the tokens are split over several, and a second small kernel
adds their parts.

A head is read in two halves of its numbers, as 4-bit codes stand in its bytes: each byte of a group
holds a number of the group's first half and one of its second.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import row_bytes, row_width
from ..tuning import token_bucket
from .codes import divide, divide_by, nonzero, to_codes
from .launch import (
    DECODE_TOKENS,
    Tuned,
    cdiv,
    check_float,
    contiguous,
    dtypes,
    multiprocessors,
    next_power_of_2,
    on_its_device,
    operand,
    registered,
)

GROUPS_A_PROGRAM = 16  # of quantize_heads
MOST_SPLITS = 16
SHORTEST_SPLIT = 256  # tokens: fewer are not worth a program


def _tile(queries: int, tokens: int, warps: int, stages: int) -> triton.Config:
    sizes = {"BLOCK_M": queries, "BLOCK_T": tokens}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


PREFILL_TILES = {
    "small": _tile(32, 32, 4, 2),
    "tall": _tile(64, 16, 4, 2),
    "float32": _tile(16, 16, 4, 1),
}
DECODE_TILES = {
    "short": _tile(16, 32, 4, 3),
    "long": _tile(16, 64, 8, 2),
    "float32": _tile(16, 16, 4, 1),
}


def _tiles_that_fit(
    configs: list[triton.Config], named: dict[str, Any], **settings: Any
) -> list[triton.Config]:
    """float32 products have no tensor cores: they take the smallest tile, the others the rest."""
    ordinary = settings["OPERAND"] == tl.float32
    smallest = {"BLOCK_M": 16, "BLOCK_T": 16}
    return [config for config in configs if (config.kwargs == smallest) == ordinary]


@triton.jit
def _heads_kernel(
    x,
    codes,
    floats,
    groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a cache from x, (groups, GROUP); `floats` is the memory of `codes` as float16."""
    HALF: tl.constexpr = GROUP // 2
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    inner = tl.arange(0, BLOCK)[None, :]
    inside = (group < groups)[:, None] & (inner < HALF)
    numbers = x + group[:, None] * GROUP + inner
    first = tl.load(numbers, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(numbers + HALF, mask=inside, other=0.0).to(tl.float32)
    lowest = tl.min(tl.where(inner < HALF, tl.minimum(first, second), float("inf")), axis=1)
    highest = tl.max(tl.where(inner < HALF, tl.maximum(first, second), float("-inf")), axis=1)
    HIGHEST: tl.constexpr = 2 ** (BITS - 1) - 1
    scale = divide_by(highest - lowest, 2 * HIGHEST + 1).to(tl.float16)
    step = scale.to(tl.float32)
    offset = (lowest + step * (HIGHEST + 1)).to(tl.float16)
    origin, step = offset.to(tl.float32)[:, None], nonzero(step)[:, None]
    a = to_codes(divide(first - origin, step), HIGHEST).to(tl.int32)
    b = to_codes(divide(second - origin, step), HIGHEST).to(tl.int32)
    row, within = group // GROUPS, group % GROUPS
    if BITS == 4:
        at = codes + (row * ROW_BYTES + within * HALF)[:, None] + inner
        tl.store(at, ((a & 15) | (b << 4)).to(tl.int8), mask=inside)
    else:
        at = codes + (row * ROW_BYTES + within * GROUP)[:, None] + inner
        tl.store(at, a.to(tl.int8), mask=inside)
        tl.store(at + HALF, b.to(tl.int8), mask=inside)
    at = floats + row * (ROW_BYTES // 2) + GROUPS * GROUP * BITS // 16 + within
    tl.store(at, scale, mask=group < groups)
    tl.store(at + GROUPS, offset, mask=group < groups)


@triton.jit
def _columns(i, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Where number i of all groups' first halves stands in a head; its partner is GROUP/2 on."""
    if WIDTH > GROUP:
        i += i // (GROUP // 2) * (GROUP // 2)
    return i


@triton.jit
def _within(i, HALF: tl.constexpr, SIZE: tl.constexpr):
    """i, of 0 … SIZE - 1, with what is past the end repeating the last."""
    return tl.minimum(i, HALF - 1) if SIZE > HALF else i


@triton.jit
def _load_codes(codes, token, i, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr):
    """int8 codes of both halves. token: where each row begins; i: the numbers; they broadcast."""
    if BITS == 4:
        packed = tl.load(codes + token + i).to(tl.int32)
        first, second = ((packed << 28) >> 28).to(tl.int8), (packed >> 4).to(tl.int8)
    else:
        at = codes + token + _columns(i, WIDTH, GROUP)
        first, second = tl.load(at), tl.load(at + GROUP // 2)
    return first, second


@triton.jit
def _load_scales(floats, token, i, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr):
    """The scale and the offset of each number's group, float32."""
    at = floats + token // 2 + WIDTH * BITS // 16
    if WIDTH > GROUP:
        at = at + i // (GROUP // 2)
    return tl.load(at).to(tl.float32), tl.load(at + WIDTH // GROUP).to(tl.float32)


@triton.jit
def _numbers(
    codes,
    scale,
    offset,
    first_tokens,
    column,
    index,
    WIDTH: tl.constexpr,
    FLOAT_TOKENS: tl.constexpr,
):
    """Half of the keys' or values' numbers, float32, the first tokens as they are kept in float."""
    numbers = codes.to(tl.float32) * scale + offset
    if FLOAT_TOKENS > 0:
        kept = (index >= 0) & (index < FLOAT_TOKENS)
        at = tl.minimum(tl.maximum(index, 0), FLOAT_TOKENS - 1) * WIDTH + column
        numbers = tl.where(kept, tl.load(first_tokens + at).to(tl.float32), numbers)
    return numbers


@triton.jit
def _attention_kernel(
    query,
    query_scale,
    keys,
    key_floats,
    values,
    value_floats,
    first_keys,
    first_values,
    start,
    mask,
    out,
    maxima,
    sums,
    rows,
    length,
    tokens,
    heads,
    scaling,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    mask_batch,
    mask_query,
    mask_token,
    bucket,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT_TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLITS: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of one head's queries (rows): their attention, or with SPLITS the sums of a part of it.

    The first product is one of integers where the queries come with a scale. Strides of keys and
    values count UNIT bytes (or float values), which tells the compiler how rows are aligned.
    maxima, sums: of a part's softmax.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    split = tl.program_id(2)
    at_key = (batch * key_batch + head * key_head) * KEY_UNIT
    at_value = (batch * value_batch + head * value_head) * VALUE_UNIT
    keys, key_floats, values = keys + at_key, key_floats + at_key // 2, values + at_value
    if value_floats is not None:
        value_floats += at_value // 2
    if FLOAT_TOKENS > 0:
        begin = tl.load(start + batch)
        first_keys += pair * FLOAT_TOKENS * WIDTH
        first_values += pair * FLOAT_TOKENS * VALUE_WIDTH
    # Rows, tokens and numbers past the end repeat the last one; they are masked or never stored.
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_row = tl.minimum(row, rows - 1)
    line = pair * rows + safe_row
    i = tl.arange(0, HALF)
    at = query + line[:, None] * WIDTH + _columns(i, WIDTH, GROUP)[None, :]
    q_first = tl.load(at, mask=(i < WIDTH // 2)[None, :], other=0)
    q_second = tl.load(at + GROUP // 2, mask=(i < WIDTH // 2)[None, :], other=0)
    if query_scale is not None:
        q_sum = tl.sum(q_first.to(tl.int32), axis=1) + tl.sum(q_second.to(tl.int32), axis=1)
        q_scale = tl.load(query_scale + line) * scaling
    else:
        q_first, q_second = q_first.to(OPERAND), q_second.to(OPERAND)
    i = _within(i, WIDTH // 2, HALF)[:, None]
    n = tl.arange(0, VALUE_HALF)
    safe_n = _within(n, VALUE_WIDTH // 2, VALUE_HALF)[None, :]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    sum_first = tl.zeros([BLOCK_M, VALUE_HALF], tl.float32)
    sum_second = tl.zeros([BLOCK_M, VALUE_HALF], tl.float32)
    for t0 in range(split * BLOCK_T, tokens, BLOCK_T * SPLITS):
        t = t0 + tl.arange(0, BLOCK_T)
        seen = (t < tokens)[None, :]
        t = tl.minimum(t, tokens - 1)
        if mask is not None:
            query_line = (safe_row % length).to(tl.int64)[:, None]
            line_mask = mask + batch * mask_batch + query_line * mask_query
            seen = seen & (tl.load(line_mask + (t * mask_token)[None, :]) != 0)
        index = t
        if FLOAT_TOKENS > 0:
            index = t - begin
        token = (t * key_token)[None, :] * KEY_UNIT
        first, second = _load_codes(keys, token, i, WIDTH, GROUP, BITS)
        scale, offset = _load_scales(key_floats, token, i, WIDTH, GROUP, BITS)
        if query_scale is not None:
            total = tl.dot(q_first, first, out_dtype=tl.int32)
            total = tl.dot(q_second, second, total, out_dtype=tl.int32)
            scores = total.to(tl.float32) * scale + q_sum.to(tl.float32)[:, None] * offset
            scores *= q_scale[:, None]
        else:
            column = _columns(i, WIDTH, GROUP)
            k = _numbers(
                first, scale, offset, first_keys, column, index[None, :], WIDTH, FLOAT_TOKENS
            )
            scores = tl.dot(q_first, k.to(OPERAND), input_precision="ieee")
            column += GROUP // 2
            k = _numbers(
                second, scale, offset, first_keys, column, index[None, :], WIDTH, FLOAT_TOKENS
            )
            scores = tl.dot(q_second, k.to(OPERAND), scores, input_precision="ieee")
            scores *= scaling
        scores = tl.where(seen, scores, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        p = tl.exp(scores - base[:, None])
        kept = tl.exp(highest - base)
        highest, weight = highest_now, weight * kept + tl.sum(p, axis=1)
        token = (t * value_token)[:, None] * VALUE_UNIT
        column = _columns(safe_n, VALUE_WIDTH, VALUE_GROUP)
        p = p.to(OPERAND)
        sum_first, sum_second = sum_first * kept[:, None], sum_second * kept[:, None]
        if value_floats is None:
            v = tl.load(values + token + column).to(OPERAND)
            sum_first = tl.dot(p, v, sum_first, input_precision="ieee")
            v = tl.load(values + token + column + VALUE_GROUP // 2).to(OPERAND)
            sum_second = tl.dot(p, v, sum_second, input_precision="ieee")
        else:
            first, second = _load_codes(values, token, safe_n, VALUE_WIDTH, VALUE_GROUP, BITS)
            scale, offset = _load_scales(
                value_floats, token, safe_n, VALUE_WIDTH, VALUE_GROUP, BITS
            )
            v = _numbers(
                first, scale, offset, first_values, column, index[:, None],
                VALUE_WIDTH, FLOAT_TOKENS,
            )  # fmt: skip
            sum_first = tl.dot(p, v.to(OPERAND), sum_first, input_precision="ieee")
            column += VALUE_GROUP // 2
            v = _numbers(
                second, scale, offset, first_values, column, index[:, None],
                VALUE_WIDTH, FLOAT_TOKENS,
            )  # fmt: skip
            sum_second = tl.dot(p, v.to(OPERAND), sum_second, input_precision="ieee")
    if SPLITS == 1:
        weight = nonzero(weight)[:, None]
        sum_first, sum_second = sum_first / weight, sum_second / weight
    else:
        line += split.to(tl.int64) * tl.num_programs(0) * rows
        tl.store(maxima + line, highest, mask=row < rows)
        tl.store(sums + line, weight, mask=row < rows)
    inside = (row < rows)[:, None] & (n < VALUE_WIDTH // 2)[None, :]
    at = out + line[:, None] * VALUE_WIDTH + _columns(safe_n, VALUE_WIDTH, VALUE_GROUP)
    tl.store(at, sum_first.to(out.dtype.element_ty), mask=inside)
    tl.store(at + VALUE_GROUP // 2, sum_second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join_kernel(
    parts, maxima, sums, out, lines, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """One line of out from the parts of its softmax, (SPLITS, lines, WIDTH)."""
    line = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS) * lines + line
    highest = tl.load(maxima + part)
    base = tl.max(highest, axis=0)
    base = tl.where(base == float("-inf"), 0.0, base)
    kept = tl.exp(highest - base)
    weight = nonzero(tl.sum(tl.load(sums + part) * kept, axis=0))
    n = tl.arange(0, BLOCK)
    at = parts + part[:, None] * WIDTH + n[None, :]
    total = tl.sum(tl.load(at, mask=(n < WIDTH)[None, :], other=0.0) * kept[:, None], axis=0)
    tl.store(out + line * WIDTH + n, (total / weight).to(out.dtype.element_ty), mask=n < WIDTH)


_KEY = ["WIDTH", "GROUP", "VALUE_WIDTH", "BITS", "SPLITS", "bucket"]
_prefill_kernel = Tuned(_attention_kernel, PREFILL_TILES, _KEY, _tiles_that_fit)
_decode_kernel = Tuned(_attention_kernel, DECODE_TILES, _KEY, _tiles_that_fit)


def _empty_rows(x: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Rows for heads x, not yet written."""
    nbytes = row_bytes(x.shape[-1], bits, group_size)
    return torch.empty(*x.shape[:-1], nbytes, dtype=torch.uint8, device=x.device)


@registered("quantize_heads", _empty_rows)
def quantize_heads(x: Tensor, bits: int, group_size: int | None) -> Tensor:
    """As `reference.quantize_heads`."""
    check_float(x, "quantize_heads")
    rows = _empty_rows(x, bits, group_size)
    width = x.shape[-1]
    size = group_size or width
    groups = x.numel() // size
    if groups:
        _heads_kernel[(cdiv(groups, GROUPS_A_PROGRAM),)](
            x.contiguous(),
            rows.view(torch.int8),
            rows.view(torch.float16),
            groups,
            size,
            width // size,
            bits,
            rows.shape[-1],
            GROUPS_A_PROGRAM,
            next_power_of_2(size // 2),
            num_warps=4,
        )
    return rows


def splits(device: torch.device, programs: int, queries: int, tokens: int) -> int:
    """Over how many programs the tokens of a head are split: enough for two a multiprocessor."""
    if queries > DECODE_TOKENS:
        return 1
    wanted = next_power_of_2(cdiv(2 * multiprocessors(device), programs))
    longest = max(tokens // SHORTEST_SPLIT, 1)
    return min(wanted, 1 << (longest.bit_length() - 1), MOST_SPLITS)


def _strided(x: Tensor) -> tuple[Tensor, list[int], int]:
    """x with its numbers side by side, its other strides (batch, head, token), and their unit."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    strides = x.stride()[:3]
    unit = 4 if all(stride % 4 == 0 for stride in strides) else 2
    return x, [stride // unit for stride in strides], unit


def _attention(
    query: Tensor,
    query_scale: Tensor | None,
    keys: Tensor,
    values: Tensor,
    firsts: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    (batch, queries, length, width), (heads, tokens) = query.shape, keys.shape[1:3]
    rows = queries // heads * length
    keys, key_strides, key_unit = _strided(keys)
    values, value_strides, value_unit = _strided(values)
    packed = values.dtype == torch.uint8
    value_width = row_width(values.shape[-1], bits, group_size) if packed else values.shape[-1]
    out = torch.empty(batch, queries, length, value_width, dtype=dtype, device=query.device)
    if out.numel() == 0:
        return out
    parts = splits(query.device, batch * heads, rows, tokens)
    lines = batch * queries * length
    sums: list[Any] = [out, None, None]
    if parts > 1:
        options: Any = {"dtype": torch.float32, "device": query.device}
        sums = [torch.empty(parts, lines, n, **options) for n in (value_width, 1, 1)]
    mask_strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        over_batch, _, *others = mask.stride()
        mask_strides = (0 if mask.shape[0] == 1 else over_batch, *others)
    smallest = 16 if query_scale is None else 32  # of the sum that a tensor core takes at a time
    first_keys, first_values, start = map(contiguous, firsts)
    kernel = _decode_kernel if rows <= DECODE_TOKENS else _prefill_kernel

    operands = (
        query.contiguous(),
        contiguous(query_scale),
        keys.view(torch.int8),
        keys.view(torch.float16),
        values.view(torch.int8) if packed else values,
        values.view(torch.float16) if packed else None,
        first_keys,
        first_values,
        start,
        None if mask is None else mask.view(torch.uint8),
        *sums,
    )
    bucket, device, group = token_bucket(tokens), query.get_device(), group_size or width

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return batch * heads, cdiv(rows, meta["BLOCK_M"]), parts

    kernel.launch(
        (device, width, group, value_width, bits, parts, bucket, dtype, *dtypes(operands)),
        grid,
        *operands,
        rows,
        length,
        tokens,
        heads,
        scaling,
        *key_strides,
        *value_strides,
        *mask_strides,
        bucket,
        WIDTH=width,
        GROUP=group,
        VALUE_WIDTH=value_width,
        VALUE_GROUP=group_size or value_width,
        BITS=bits,
        FLOAT_TOKENS=0 if first_keys is None else first_keys.shape[2],
        OPERAND=operand(dtype),
        SPLITS=parts,
        KEY_UNIT=key_unit,
        VALUE_UNIT=value_unit,
        HALF=max(next_power_of_2(width // 2), smallest),
        VALUE_HALF=max(next_power_of_2(value_width // 2), 16),
    )
    if parts > 1:
        block = next_power_of_2(value_width)
        _join_kernel[(lines,)](*sums, out, lines, value_width, parts, block, num_warps=4)
    return out


@on_its_device
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
    """As `reference.cached_attention`: products of the query's dtype, sums in float32."""
    check_float(query, "cached_attention")
    firsts = (first_keys, first_values, start)
    settings = (mask, scaling, bits, group_size, query.dtype)
    return _attention(query, None, keys, values, firsts, *settings)


@on_its_device
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
    """As `reference.int8_attention`: the second product of `dtype`, sums in float32."""
    firsts = (None, None, None)
    return _attention(codes, scale, keys, values, firsts, mask, scaling, bits, None, dtype)
