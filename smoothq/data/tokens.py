"""Token sequences for calibration, grouped by length and divided into micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MICRO_BATCH_TOKENS = 2048  # tokens of one calibration forward, or one longer sequence


@dataclass(frozen=True)
class Batch:
    """The input of one forward: tokens, and what a processor made to go with them.

    Attributes:
        tokens: int64 (sequences, length).
        features: argument of the model's forward → tensor, such as pixel values and the sizes of
            images; floats are float32. Empty for text alone.
        where: the place in the data, for messages.
    """

    tokens: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    where: str = "data"

    def to(self, device: torch.device) -> Batch:
        """This batch on a device."""
        features = {name: tensor.to(device) for name, tensor in self.features.items()}
        return Batch(self.tokens.to(device), features, self.where)


@dataclass(frozen=True)
class Tokens:
    """Token sequences grouped by length, without padding.

    Masked tokens have been removed, so statistics, losses and the inputs of experts need no mask.

    Attributes:
        groups: int64 (sequences, length), one tensor for each distinct length.
        featured: sequences with images or sound; each is the input of one forward.
    """

    groups: tuple[Tensor, ...]
    featured: tuple[Batch, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Tensor], featured: Iterable[Batch] = ()) -> Tokens:
        """Group sequences by length.

        Args:
            rows: sequences of any lengths, int64 (length,).
            featured: sequences with images or sound.
        """
        by_length: dict[int, list[Tensor]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        return cls(tuple(torch.stack(group) for group in by_length.values()), tuple(featured))

    @property
    def count(self) -> int:
        """Number of tokens in all sequences; an image counts as many as its placeholders are."""
        return sum(tokens.numel() for tokens in (*self.groups, *(b.tokens for b in self.featured)))

    @property
    def micro_batches(self) -> tuple[Batch, ...]:
        """All sequences as inputs of single forwards; those of text first."""
        text = (Batch(batch) for group in self.groups for batch in micro_batches(group))
        return *text, *self.featured

    def fingerprint(self) -> str:
        """SHA-256 of the sequences' lengths, tokens and features, in hexadecimal."""
        digest = hashlib.sha256()
        for group in self.groups:
            _add(digest, "", group)
        for batch in self.featured:
            for name, tensor in (("input_ids", batch.tokens), *sorted(batch.features.items())):
                _add(digest, f"{name} {tensor.dtype} ", tensor)
        return digest.hexdigest()


def _add(digest: hashlib._Hash, label: str, tensor: Tensor) -> None:
    digest.update(f"{label}{tuple(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().numpy().tobytes())


def micro_batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Split sequences of one length into inputs of single forwards.

    Args:
        tokens: int64 (samples, length).

    Returns:
        int64 (n, length) views, with n · length ≤ `MICRO_BATCH_TOKENS` or n = 1.
    """
    batches: tuple[Tensor, ...] = tokens.split(max(1, MICRO_BATCH_TOKENS // tokens.shape[1]))
    return batches
