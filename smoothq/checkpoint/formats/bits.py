"""Codes out of packed words: integers of a few bits, and floats of four and eight.

Floats are looked up in pairs, of which two float32 numbers are one int64: that is several times as
fast as PyTorch's conversion on CPUs.
"""

from __future__ import annotations

from functools import cache

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
    codes = packed.contiguous().view(torch.uint8).flatten().to(torch.int32)
    decoded = _fp4_pairs().index_select(0, codes).view(torch.float32)
    return decoded.view(*packed.shape[:-1], 2 * packed.shape[-1])


def fp8(codes: Tensor) -> Tensor:
    """The float32 values of codes of any shape, in one of PyTorch's float8 dtypes."""
    if codes.shape[-1] % 2:
        return codes.float()
    pairs = codes.contiguous().view(torch.int16).flatten().to(torch.int32) & 0xFFFF
    decoded = _fp8_pairs(codes.dtype).index_select(0, pairs).view(torch.float32)
    return decoded.view(codes.shape)


@cache
def _fp4_pairs() -> Tensor:
    """The values of the two codes of each byte, int64 (256,)."""
    values = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)))
    codes = nibbles(torch.arange(1 << 8, dtype=torch.uint8))
    return values[codes.to(torch.int32)].view(torch.int64)


@cache
def _fp8_pairs(dtype: torch.dtype) -> Tensor:
    """The values of the two codes of each 16 bits, int64 (65536,)."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return codes.view(dtype).float().view(torch.int64)
