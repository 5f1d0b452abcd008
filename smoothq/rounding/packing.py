"""The stored form of codes in a checkpoint.

- 4-bit codes: uint8 (N, ⌈K/2⌉), two a byte, in blocks of 64 columns as `unpack_int4` of
  `kernels.reference` defines them. Kernels read this form.
- 8-bit codes: int8 (N, K, 1).
- Codes of other widths: int32 (N, ⌈K · bits / 32⌉), as `unpack_words` of `kernels.reference`
  defines them.

Neither is the shape of `nn.Linear.weight`: a process that loads the checkpoint without smoothq
fails on it, instead of running with random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.reference import PACKED_BLOCK, WORD_BITS, unpack_codes


def packed_like(rows: int, columns: int, bits: int) -> Tensor:
    """A meta tensor with shape and dtype of the stored form of codes, (rows, columns)."""
    if bits == 4:
        return torch.empty(rows, (columns + 1) // 2, dtype=torch.uint8, device="meta")
    if bits < 8:
        words = -(-columns * bits // WORD_BITS)
        return torch.empty(rows, words, dtype=torch.int32, device="meta")
    return torch.empty(rows, columns, 1, dtype=torch.int8, device="meta")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, int8 (N, K), in the stored form.

    Args:
        codes: of the given width.
        bits: 2 to 8.
    """
    if bits == 8:
        return codes.unsqueeze(-1).contiguous()
    if bits != 4:
        return _words(codes, bits)
    columns = codes.shape[1]
    nibbles = nn.functional.pad(codes, (0, columns % 2)).to(torch.uint8) & 15
    whole = columns // PACKED_BLOCK * PACKED_BLOCK
    blocks = nibbles[:, :whole].unflatten(1, (-1, 2, PACKED_BLOCK // 2))
    rest = nibbles[:, whole:].unflatten(1, (2, -1))
    low = torch.cat([blocks[:, :, 0].flatten(1), rest[:, 0]], 1)
    high = torch.cat([blocks[:, :, 1].flatten(1), rest[:, 1]], 1)
    return (low | (high << 4)).contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes packed into words, each row one sequence of bits, the lowest first."""
    rows, columns = codes.shape
    count = -(-columns * bits // WORD_BITS)
    first = torch.arange(columns, device=codes.device) * bits
    word, shift = first // WORD_BITS, first % WORD_BITS
    # A code may reach into the next word.
    bits_of = (codes.long() + 2 ** (bits - 1)) << shift
    words = torch.zeros(rows, count + 1, dtype=torch.int64, device=codes.device)
    words.index_add_(1, word, bits_of & (2**WORD_BITS - 1))
    words.index_add_(1, word + 1, bits_of >> WORD_BITS)
    return words[:, :count].to(torch.int32)


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Codes, int8 (N, columns), from the stored form; the inverse of `pack`."""
    packed = packed.squeeze(-1) if bits == 8 else packed
    codes: Tensor = unpack_codes(packed, columns, bits)
    return codes
