"""Token sequences for calibration, grouped by length and divided into micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MICRO_BATCH_TOKENS = 2048  # tokens of one calibration forward, or one longer sequence


@dataclass(frozen=True)
class Tokens:
    """Token sequences grouped by length, without padding.

    Masked tokens have been removed, so statistics, losses and the inputs of experts need no mask.

    Attributes:
        groups: int64 (sequences, length), one tensor for each distinct length.
    """

    groups: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: Iterable[Tensor]) -> Tokens:
        """Group sequences by length.

        Args:
            rows: sequences of any lengths, int64 (length,).
        """
        by_length: dict[int, list[Tensor]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        return cls(tuple(torch.stack(group) for group in by_length.values()))

    @property
    def count(self) -> int:
        """Number of tokens in all sequences."""
        return sum(group.numel() for group in self.groups)

    @property
    def micro_batches(self) -> tuple[Tensor, ...]:
        """All sequences as inputs of single forwards, int64 (sequences, length)."""
        return tuple(batch for group in self.groups for batch in micro_batches(group))

    def fingerprint(self) -> str:
        """SHA-256 of the sequences' lengths and tokens, in hexadecimal."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(f"{tuple(group.shape)}".encode())
            digest.update(group.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def micro_batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Split sequences of one length into inputs of single forwards.

    Args:
        tokens: int64 (samples, length).

    Returns:
        int64 (n, length) views, with n · length ≤ `MICRO_BATCH_TOKENS` or n = 1.
    """
    batches: tuple[Tensor, ...] = tokens.split(max(1, MICRO_BATCH_TOKENS // tokens.shape[1]))
    return batches
