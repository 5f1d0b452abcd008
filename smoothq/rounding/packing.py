"""How codes lie in a checkpoint: in shapes that a dense layer of the same name refuses.

4-bit codes stand two a byte, in blocks of 64 columns as `kernels.reference.unpack_int4` defines
them: uint8 (N, ⌈K/2⌉), which the kernels read as they are. 8-bit codes get a third dimension:
int8 (N, K, 1). A process that loads the checkpoint without smoothq then fails on the shape of
`weight`, where it would otherwise run with random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.reference import PACKED_BLOCK, unpack_int4


def packed_like(rows: int, columns: int, bits: int) -> Tensor:
    """The shape and dtype of packed codes, as a meta tensor."""
    if bits == 4:
        return torch.empty(rows, (columns + 1) // 2, dtype=torch.uint8, device="meta")
    return torch.empty(rows, columns, 1, dtype=torch.int8, device="meta")


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 (N, K) → the stored form."""
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
    """The stored form → int8 (N, columns)."""
    return unpack_int4(packed, columns) if bits == 4 else packed.squeeze(-1)
