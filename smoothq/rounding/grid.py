"""Integer grids of weights: codes, scales, multipliers, zero points, and the search for scales.

A weight matrix (N, K) is rounded to ŵ_nk = q_nk · s_ng · m_ng, where q is a code, g the group of
input channel k (one group a row, unless the granularity is `group`), s a scale and m an integer
multiplier, where the grid has these. b-bit codes are −2^(b−1) … 2^(b−1)−1. In a full-range grid,
and always with multipliers, scales are signed: the weight of largest magnitude in a group gets the
lowest code. An asymmetric grid has a zero point z, a code, in each group: ŵ = (q − z) · s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels import highest_code, largest_multiplier
from ..kernels.reference import extreme, nonzero

CLIP_RATIOS = [1 - 0.02 * step for step in range(36)]  # 1.00 … 0.30 of the group's maximum
CLIP_EXPONENT = 2.4  # the p of Σ |w − ŵ|^p in the common "mse" clip search
CHUNK_ELEMENTS = 1 << 17  # weights searched or rounded at a time: temporaries stay in cache


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix (N, K) are searched or rounded at a time."""
    return max(1, CHUNK_ELEMENTS // matrix.shape[1])


@dataclass(frozen=True)
class IntegerGrid:
    """The integer grid of a weight matrix.

    Attributes:
        bits: width of a code.
        granularity: what shares a scale: the matrix, an output channel (row), or a group of a row.
        group_size: input channels of a group; the width unless the granularity is `group`.
        multiplier: scales of groups are int8 multiples of one float scale a row.
        clip: scales minimise Σ |w − ŵ|^2.4 ("mse"); else they cover the maximum ("absmax").
        full_range: signed scales; the weight of largest magnitude gets the lowest code.
        symmetric: no zero points.
    """

    bits: int
    granularity: Literal["tensor", "channel", "group"]
    group_size: int
    multiplier: bool
    clip: bool
    full_range: bool = False
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        """The lowest code, −2^(b−1)."""
        return -self.highest - 1

    @property
    def highest(self) -> int:
        """The highest code, 2^(b−1) − 1."""
        highest: int = highest_code(self.bits)
        return highest

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of stored scales: bfloat16 where every group has its own, else float32."""
        many = self.granularity == "group" and not self.multiplier
        return torch.bfloat16 if many else torch.float32

    def codes(self, weight: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """round(w / step) + zero, clamped to the grid, in the weight's dtype.

        Args:
            weight: float, of any shape.
            step: the value of one code, broadcastable to the weight.
            zero: the zero point, likewise, or None.
        """
        rounded = (weight / step).round_()
        if zero is not None:
            rounded += zero
        return rounded.clamp_(self.lowest, self.highest)

    def find_scales(self, weight: Tensor) -> Scales:
        """Scales for a matrix, float (N, K), from its maxima or by the clip search."""
        groups = weight.float().unflatten(-1, (-1, self.group_size))
        if self.granularity == "tensor":
            best = self._search(groups.reshape(1, 1, -1)).expand(weight.shape[0], 1)
            return Scales(best.contiguous(), None)
        chunks = groups.split(rows_at_once(weight))
        if not self.symmetric:
            scale, zero = (torch.cat(p) for p in zip(*map(self._search_zero, chunks), strict=True))
            return Scales(scale.to(self.scale_dtype), None, zero.to(torch.int8))
        if not self.multiplier:
            scale = torch.cat([self._search(chunk) for chunk in chunks])
            return Scales(scale.to(self.scale_dtype), None)
        most = torch.cat([chunk.abs().amax((-2, -1)) for chunk in chunks])
        base = nonzero(most / (-self.lowest * largest_multiplier(self.bits))).unsqueeze(-1)
        parts = zip(chunks, base.split(rows_at_once(weight)), strict=True)
        multiplier = torch.cat([self._search_multiplier(*part) for part in parts])
        return Scales(base, multiplier)

    def _search(self, groups: Tensor) -> Tensor:
        """The scale of each group: (n, G, size) → (n, G)."""
        full: Tensor = nonzero(self._covering(groups))
        if not self.clip:
            return full
        # Candidates are compared as they will be stored: rounding the winner could make it a loser.
        candidates = [(full * ratio).to(self.scale_dtype).float() for ratio in CLIP_RATIOS]
        return self._least_error(groups, candidates)

    def _search_zero(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of each group: (n, G, size) → (n, G) twice."""
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best: tuple[Tensor, Tensor] | None = None
        least = torch.full_like(low, torch.inf)
        for ratio in CLIP_RATIOS if self.clip else CLIP_RATIOS[:1]:
            step = nonzero((high - low) * ratio / (self.highest - self.lowest))
            step = step.to(self.scale_dtype).float()
            zero = (self.lowest - low * ratio / step).round().clamp(self.lowest, self.highest)
            error = self._error(groups, step, zero)
            better = error < least
            previous = (step, zero) if best is None else best
            best = torch.where(better, step, previous[0]), torch.where(better, zero, previous[1])
            least = torch.minimum(error, least)
        assert best is not None
        return best

    def _search_multiplier(self, groups: Tensor, base: Tensor) -> Tensor:
        """The multiplier of each group: (n, G, size), (n, 1) → int8 (n, G)."""
        largest = largest_multiplier(self.bits)
        covering = self._covering(groups) / base
        sign = torch.where(covering < 0, -1.0, 1.0)
        if not self.clip:
            return (sign * covering.abs().ceil().clamp_(1, largest)).to(torch.int8)
        steps = [base * sign * m for m in range(1, largest + 1)]
        return (self._least_error(groups, steps) / base).round_().to(torch.int8)

    def _covering(self, groups: Tensor) -> Tensor:
        """The smallest scale of each group that clips no weight: (n, G, size) → (n, G)."""
        if not (self.full_range or self.multiplier):
            return groups.abs().amax(-1) / self.highest
        covering: Tensor = extreme(groups).squeeze(-1) / self.lowest
        return covering

    def _least_error(self, groups: Tensor, candidates: list[Tensor]) -> Tensor:
        best, least = candidates[0], torch.full_like(candidates[0], torch.inf)
        for step in candidates:
            error = self._error(groups, step)
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        return best

    def _error(self, groups: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """Σ |w − ŵ|^p of each group: (n, G, size), (n, G) → (n, G)."""
        wide = step.unsqueeze(-1)
        if zero is None:
            rounded = self.codes(groups, wide)
        else:
            rounded = self.codes(groups, wide, zero.unsqueeze(-1)).sub_(zero.unsqueeze(-1))
        return rounded.mul_(wide).sub_(groups).abs_().pow_(CLIP_EXPONENT).sum(-1)


@dataclass(frozen=True)
class Scales:
    """The scales of a weight matrix.

    Attributes:
        scale: float32 (N, 1), or bfloat16 (N, G) where every group has its own.
        multiplier: int8 (N, G), or None.
        zero: the zero points, int8 in the shape of `scale`, or None.
    """

    scale: Tensor
    multiplier: Tensor | None
    zero: Tensor | None = None

    def step(self, dtype: torch.dtype) -> Tensor:
        """The effective scales, multipliers included: (N, 1) or (N, G), in `dtype`."""
        step = self.scale.to(dtype)
        return step if self.multiplier is None else step * self.multiplier.to(dtype)

    def step_by_column(self, columns: int, dtype: torch.dtype) -> Tensor:
        """The effective scale of every weight, (N, columns), in `dtype`."""
        return _by_column(self.step(dtype), columns)

    def zero_by_column(self, columns: int, dtype: torch.dtype) -> Tensor | None:
        """The zero point of every weight, (N, columns), in `dtype`, or None."""
        return None if self.zero is None else _by_column(self.zero.to(dtype), columns)

    def map(self, change: Callable[[Tensor], Tensor]) -> Scales:
        """Scales with `change` applied to every tensor."""
        multiplier = None if self.multiplier is None else change(self.multiplier)
        zero = None if self.zero is None else change(self.zero)
        return Scales(change(self.scale), multiplier, zero)


def _by_column(values: Tensor, columns: int) -> Tensor:
    return values.repeat_interleave(columns // values.shape[1], 1)


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded matrix.

    Attributes:
        codes: int8 (N, K).
        scales: of the codes.
        unrounded: float32 (N, K), the weights before rounding, for GPTQ with compensated errors;
            None where they are unknown.
    """

    codes: Tensor
    scales: Scales
    unrounded: Tensor | None = None

    def to(self, device: torch.device) -> QuantizedWeight:
        """A copy on a device; the tensors themselves where they are on it."""
        scales = self.scales.map(lambda tensor: tensor.to(device))
        unrounded = None if self.unrounded is None else self.unrounded.to(device)
        return QuantizedWeight(self.codes.to(device), scales, unrounded)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ = (code − zero) · scale · multiplier, (N, K) in `dtype`."""
        columns, codes = self.codes.shape[1], self.codes.to(dtype)
        zero = self.scales.zero_by_column(columns, dtype)
        if zero is not None:
            codes = codes - zero
        return codes * self.scales.step_by_column(columns, dtype)
