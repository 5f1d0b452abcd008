"""GGUF, the format of llama.cpp: blocks of codes, order of rows for RoPE.

A row is cut into blocks of 32 weights with one float16 scale d each, which may be negative. Q8_0
holds int8 codes q that stand for d · q. Q4_0 holds nibbles n that stand for d · (n − 8), Q4_1 also
a float16 m for d · n + m: element j of a block in the low half of byte j, j + 16 in its high half.
"""

from __future__ import annotations

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ..rounding.grid import QuantizedWeight

BLOCK = 32  # weights of a block
SCALE_LOSS = 2.0**-9  # largest relative rounding error of a scale: that of bfloat16
TYPES = {  # (bits of a code, symmetric) → block type
    (4, True): GGMLQuantizationType.Q4_0,
    (4, False): GGMLQuantizationType.Q4_1,
    (8, True): GGMLQuantizationType.Q8_0,
}


def block_bytes(kind: GGMLQuantizationType) -> int:
    """Bytes of a block: 32 codes, their scale, and for Q4_1 the offset."""
    nbytes: int = GGML_QUANT_SIZES[kind][1]
    return nbytes


def blocks(weight: QuantizedWeight, kind: GGMLQuantizationType) -> Tensor:
    """Encode a quantized matrix in GGUF blocks.

    Args:
        weight: codes (N, K); K and the group size must be multiples of 32. Exact only where
            `lost_scales` is 0.
        kind: the block type of its codes.

    Returns:
        uint8 (N, K / 32 · block_bytes).
    """
    scales, offsets = _block_scales(weight)
    numbers = [scales] if offsets is None else [scales, offsets]
    codes = weight.codes.unflatten(1, (-1, BLOCK))
    if kind is not GGMLQuantizationType.Q8_0:
        low, high = (codes + 8).chunk(2, -1)
        codes = low | high << 4
    parts = [torch.stack(numbers, -1).half().view(torch.uint8), codes.view(torch.uint8)]
    return torch.cat(parts, -1).flatten(1)


def lost_scales(weight: QuantizedWeight) -> int:
    """The number of block scales that float16 cannot hold: overflow, or error > SCALE_LOSS."""
    exact, offsets = _block_scales(weight)
    lost = (exact.half().float() - exact).abs() > SCALE_LOSS * exact.abs()
    if offsets is not None:
        lost |= offsets.half().isinf()
    return int(lost.sum())


def _block_scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Scales d, and with zero points offsets m, both float32 (N, K / 32).

    Both are 0 in a block in which all weights are zero, whose scale has no effect.
    """
    scales, (_, columns) = weight.scales, weight.codes.shape
    steps = scales.step_by_column(columns // BLOCK, torch.float32)
    zeros = scales.zero_by_column(columns, torch.int8)
    levels = weight.codes if zeros is None else weight.codes - zeros
    steps = torch.where(levels.unflatten(1, (-1, BLOCK)).any(-1), steps, 0.0)
    lowest = scales.zero_by_column(columns // BLOCK, torch.float32)
    # From the scale rounded to float16, so that a weight of zero stays near zero.
    return steps, None if lowest is None else -steps.half().float() * (lowest + 8)


def paired_rows(rows: int, heads: int) -> Tensor:
    """Order of a query's or key's rows that makes the rows of each RoPE pair adjacent.

    transformers rotates element j of a head together with element j + head_size / 2.

    Args:
        rows: of the matrix: heads · head_size.
        heads: of the query or key.

    Returns:
        int64 (rows,): the source row of each row.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def with_rows(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """A quantized matrix with its rows permuted: row i is row `order[i]`, int64 (N,)."""
    return QuantizedWeight(weight.codes[order], weight.scales.map(lambda values: values[order]))
