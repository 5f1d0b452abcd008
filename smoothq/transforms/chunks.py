"""A matrix in stretches: what is folded in float64 a stretch at a time takes little memory."""

from __future__ import annotations

from torch import Tensor

ELEMENTS = 1 << 16  # of a stretch: 512 KB in float64


def rows_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a matrix (N, K), some whole rows each."""
    return _split(matrix, 0)


def columns_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a matrix (N, K), some whole columns each."""
    return _split(matrix, 1)


def _split(matrix: Tensor, dim: int) -> tuple[Tensor, ...]:
    stretches: tuple[Tensor, ...] = matrix.split(max(1, ELEMENTS // matrix.shape[1 - dim]), dim)
    return stretches
