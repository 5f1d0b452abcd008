"""Codes out of packed words: integers of a few bits, and floats of four."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # bits
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without its sign, the highest bit


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned codes out of a stream of bits that begins with the lowest: uint8 (..., count).

    Args:
        words: int32 (..., words).
        bits: of a code, at most 8.
        count: of codes in the last axis.
    """
    if bits == 8:
        return words.contiguous().view(torch.uint8)[..., :count]
    if bits == 4:
        return nibbles(words.contiguous().view(torch.uint8))[..., :count]
    starts = torch.arange(count) * bits
    place, shift = starts // WORD, starts % WORD
    unsigned = words.to(torch.int64) & (1 << WORD) - 1
    following = (place + 1).clamp(max=words.shape[-1] - 1)
    low, high = unsigned[..., place] >> shift, unsigned[..., following] << (WORD - shift)
    return ((low | high) & (1 << bits) - 1).to(torch.uint8)


def nibbles(packed: Tensor) -> Tensor:
    """The two halves of every byte, the lower first: uint8 (..., 2 · bytes) of (..., bytes)."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


def fp4(packed: Tensor) -> Tensor:
    """Two E2M1 numbers out of every byte, the lower half first: float32 (..., 2 · bytes).

    Args:
        packed: uint8 or int8 (..., bytes).
    """
    values = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)))
    return values[nibbles(packed.contiguous().view(torch.uint8)).to(torch.int32)]
