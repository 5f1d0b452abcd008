"""Matrices of FP4 codes, two in a byte, with a scale for a group of inputs and perhaps a matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..stored import WeightFiles
from .bits import fp4
from .format import ScaledWeight


@dataclass(frozen=True)
class Fp4Weight(ScaledWeight):
    """FP4 codes, uint8 (out, in / 2).

    whole: stored name of the scale of all scales; None has none.
    """

    whole: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of a weight with scales, and the scale of all scales."""
        return *super().parts, *(() if self.whole is None else (self.whole,))

    def code_values(self, files: WeightFiles, first: int, last: int) -> Tensor:
        """The codes' values: float32 (last - first, in)."""
        return fp4(super().code_values(files, first, last))


def halves(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what FP4 codes of two in a byte decode to; shape: of the bytes."""
    return (*shape[:-1], 2 * shape[-1])
