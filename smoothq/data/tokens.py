"""Sequences of tokens that a model is calibrated on, in the stretches that one forward takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MICRO_BATCH_TOKENS = 2048  # tokens that one calibration forward takes


@dataclass(frozen=True)
class Tokens:
    """Sequences, those of one length together: int64 (sequences, length), each of another length.

    A token that a mask hides is not among them. So nothing that is made of tokens, neither a
    statistic nor a loss nor an expert's input, has to know of masks, and nothing is ever padded.
    """

    groups: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: Iterable[Tensor]) -> Tokens:
        """Sequences of any lengths, int64 (length,) each."""
        by_length: dict[int, list[Tensor]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        return cls(tuple(torch.stack(group) for group in by_length.values()))

    @property
    def count(self) -> int:
        """Tokens of all sequences."""
        return sum(group.numel() for group in self.groups)

    @property
    def micro_batches(self) -> tuple[Tensor, ...]:
        """All sequences, int64 (sequences, length), in the stretches that one forward takes."""
        return tuple(batch for group in self.groups for batch in micro_batches(group))

    def fingerprint(self) -> str:
        """A hash of every sequence's length and tokens."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(f"{tuple(group.shape)}".encode())
            digest.update(group.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def micro_batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Sequences of one length, int64 (samples, length), in the stretches that one forward takes."""
    batches: tuple[Tensor, ...] = tokens.split(max(1, MICRO_BATCH_TOKENS // tokens.shape[1]))
    return batches
