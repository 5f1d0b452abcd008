"""The stored form of codes in a checkpoint.

- 4-bit codes: uint8 (N, ⌈K/2⌉), two a byte, in blocks of 64 columns as `unpack_int4` of
  `kernels.reference` defines them. Kernels read this form.
- 8-bit codes: int8 (N, K, 1).

Neither is the shape of `nn.Linear.weight`: a process that loads the checkpoint without smoothq
fails on it, instead of running with random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.reference import PACKED_BLOCK, unpack_int4


def packed_like(rows: int, columns: int, bits: int) -> Tensor:
    """A meta tensor with shape and dtype of the stored form of codes, (rows, columns)."""
    if bits == 4:
        return torch.empty(rows, (columns + 1) // 2, dtype=torch.uint8, device="meta")
    return torch.empty(rows, columns, 1, dtype=torch.int8, device="meta")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, int8 (N, K), in the stored form.

    Args:
        codes: of the given width.
        bits: 4, or another width, which is stored in 8 bits.
    """
    if bits != 4:
        return codes.unsqueeze(-1).contiguous()
    columns = codes.shape[1]
    nibbles = nn.functional.pad(codes, (0, columns % 2)).to(torch.uint8) & 15
    whole = columns // PACKED_BLOCK * PACKED_BLOCK
    blocks = nibbles[:, :whole].unflatten(1, (-1, 2, PACKED_BLOCK // 2))
    rest = nibbles[:, whole:].unflatten(1, (2, -1))
    low = torch.cat([blocks[:, :, 0].flatten(1), rest[:, 0]], 1)
    high = torch.cat([blocks[:, :, 1].flatten(1), rest[:, 1]], 1)
    return (low | (high << 4)).contiguous()


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Codes, int8 (N, columns), from the stored form; the inverse of `pack`."""
    return unpack_int4(packed, columns) if bits == 4 else packed.squeeze(-1)
