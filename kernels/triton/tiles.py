"""Tiles of a product: which tile a program computes, and how its result is scaled and stored."""

import triton
import triton.language as tl


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(rows of tokens, rows of weight) of a program: in bands, so that neighbours share in cache.

    BAND tiles of tokens are walked together along N: what they read stays in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (BAND * tiles_n)
    first = band * BAND
    height = min(tiles_m - first, BAND)
    within = program % (BAND * tiles_n)
    tile_m, tile_n = first + within % height, within // height
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit
def load_columns(rows, columns, inside, EVEN: tl.constexpr):
    """A tile from pointers to rows and column numbers that broadcast; zero outside."""
    return tl.load(rows + columns) if EVEN else tl.load(rows + columns, mask=inside, other=0)


@triton.jit
def scale_and_store(total, scale, scale_stride, weight_scale, bias, out, m, n, M, N, factor):
    """out[m, n] = total[n, m] · scale[m] · weight_scale[n] · factor + bias[n], in out's dtype."""
    token_scale = tl.load(scale + m * scale_stride, mask=m < M, other=0.0)
    row_scale = tl.load(weight_scale + n, mask=n < N, other=0.0).to(tl.float32) * factor
    result = tl.trans(total.to(tl.float32)) * token_scale[:, None] * row_scale[None, :]
    if bias is not None:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    store(result, out, m, n, M, N)


@triton.jit
def add_bias_and_store(result, bias, weight_rows, out, m, n, M, N):
    """Write a tile, float32 (BLOCK_M, BLOCK_N), of out (M, N), plus the bias of its rows, or None.

    weight_rows: n, or for those past the end rows that there are.
    """
    if bias is not None:
        result += tl.load(bias + weight_rows).to(tl.float32)[None, :]
    store(result, out, m, n, M, N)


@triton.jit
def store(result, out, m, n, M, N):
    """Write a tile, float32 (BLOCK_M, BLOCK_N), of out (M, N)."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    pointers = out + m[:, None] * N + n[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)
