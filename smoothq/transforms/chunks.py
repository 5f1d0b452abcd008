"""Matrices in chunks: computing in float64 one chunk at a time takes little memory."""

from __future__ import annotations

from torch import Tensor

from ..runtime.mapped import touch

ELEMENTS = 1 << 16  # of a chunk: 512 KB in float64


def rows_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """A matrix (N, K) in chunks of whole rows, as views."""
    return _split(matrix, 0)


def columns_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """A matrix (N, K) in chunks of whole columns, as views."""
    return _split(matrix, 1)


def _split(matrix: Tensor, dim: int) -> tuple[Tensor, ...]:
    touch(matrix)
    chunks: tuple[Tensor, ...] = matrix.split(max(1, ELEMENTS // matrix.shape[1 - dim]), dim)
    return chunks
