"""Grids of weights: codes, scales, multipliers, zero points, and the search for scales.

A grid is a number format. Its codes are numbered in the order of their values, so that rounding,
GPTQ and tuning work on any: an integer is its own code, and of floating-point formats a code is
the rank (`kernels.formats`, `float_grid`).

A weight matrix (N, K) is rounded to ŵ_nk = q_nk · s_ng · m_ng, where q is a code, g the group of
input channel k (one group a row, unless the granularity is `group`), s a scale and m an integer
multiplier, where the grid has these. b-bit codes are −2^(b−1) … 2^(b−1)−1. In a full-range grid,
and always with multipliers, scales are signed: the weight of largest magnitude in a group gets the
lowest code. An asymmetric grid has a zero point z, a code, in each group: ŵ = (q − z) · s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..kernels import highest_code, largest_multiplier
from ..kernels.formats import FORMATS
from ..kernels.reference import extreme, nonzero
from .packing import pack, packed_like, unpack

CLIP_RATIOS = [1 - 0.02 * step for step in range(36)]  # 1.00 … 0.30 of the group's maximum
CLIP_EXPONENT = 2.4  # the p of Σ |w − ŵ|^p in the common "mse" clip search
CHUNK_ELEMENTS = 1 << 17  # weights searched or rounded at a time: temporaries stay in cache


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix (N, K) are searched or rounded at a time."""
    return max(1, CHUNK_ELEMENTS // matrix.shape[1])


Granularity = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True)
class Grid(ABC):
    """A number format of a weight matrix: its codes, and what scales them.

    Attributes:
        bits: width of a code.
        granularity: what shares a scale: the matrix, an output channel (row), a group of a row, or
            a block of 128 × 128.
        group_size: input channels that share a scale; all of them unless the granularity is `group`
            or `block`.
    """

    bits: int
    granularity: Granularity
    group_size: int

    element = "int"  # the name of the format of codes, as a class's constant or field
    symmetric = True  # no zero points
    multiplier = False  # scales of groups are integer multiples of their row's
    shares_scale = False  # a tensor's scale, with the matrices that read the same input
    learns_scales = True  # whether scales may take any value, as tuning wants

    @property
    @abstractmethod
    def lowest(self) -> int:
        """The lowest code."""

    @property
    @abstractmethod
    def highest(self) -> int:
        """The highest code."""

    @property
    @abstractmethod
    def tried_scales(self) -> int:
        """How many scales are tried for each group, for estimates."""

    @abstractmethod
    def codes(self, weight: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """The codes nearest to w / step, plus the zero point, in the weight's dtype.

        Args:
            weight: float, of any shape.
            step: the value of a code of one, broadcastable to the weight.
            zero: the zero point, likewise, or None.
        """

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """The values of codes, less their zero points, as multiples of the step; float (...)."""

    @abstractmethod
    def positions(self, values: Tensor) -> Tensor:
        """Where values, as multiples of the step, lie among the codes: float (...).

        Rounded to the nearest integer they are the nearest codes.
        """

    @abstractmethod
    def find_scales(self, weight: Tensor, largest: float | None = None) -> Scales:
        """Scales for a matrix, from its maxima or by the clip search.

        Args:
            weight: float (N, K).
            largest: the maximum of all matrices that share a tensor's scale, where the grid has
                one; None for the matrix's own.
        """

    @abstractmethod
    def stored_scales(self, rows: int, columns: int) -> dict[str, Tensor]:
        """The tensors in which a checkpoint stores the scales, on the meta device, by name."""

    @abstractmethod
    def store(self, scales: Scales) -> dict[str, Tensor]:
        """The scales as they are stored."""

    @abstractmethod
    def scales_of(self, stored: Mapping[str, Tensor | None], rows: int, columns: int) -> Scales:
        """The scales that are stored for a matrix of that shape: the inverse of `store`."""

    @abstractmethod
    def unclipped(self) -> Grid:
        """The grid with scales by the maxima, without a search."""

    def packed_like(self, rows: int, columns: int) -> Tensor:
        """A meta tensor with shape and dtype of the stored codes."""
        return packed_like(rows, columns, self.bits)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes, int8 (N, K), as they are stored."""
        return pack(codes, self.bits)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Codes, int8 (N, columns), from what is stored."""
        return unpack(packed, columns, self.bits)

    def _least_error(self, groups: Tensor, candidates: list[Tensor]) -> Tensor:
        """The candidate with the least error for each group: (n, G, size), of (n, G) → (n, G)."""
        best, least = candidates[0], torch.full_like(candidates[0], torch.inf)
        for step in candidates:
            error = self._error(groups, step)
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        return best

    def _error(self, groups: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """Σ |w − ŵ|^p of each group: (n, G, size), (n, G) → (n, G)."""
        wide = step.unsqueeze(-1)
        codes = self.codes(groups, wide, None if zero is None else zero.unsqueeze(-1))
        if zero is not None:
            codes = codes.sub_(zero.unsqueeze(-1))
        return self.values(codes).mul_(wide).sub_(groups).abs_().pow_(CLIP_EXPONENT).sum(-1)


@dataclass(frozen=True)
class IntegerGrid(Grid):
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

    multiplier: bool = False
    clip: bool = False
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

    @property
    def tried_scales(self) -> int:
        """See `Grid`."""
        if not self.clip:
            return 1
        return largest_multiplier(self.bits) if self.multiplier else len(CLIP_RATIOS)

    def codes(self, weight: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """round(w / step) + zero, clamped to the grid, in the weight's dtype."""
        rounded = (weight / step).round_()
        if zero is not None:
            rounded += zero
        return rounded.clamp_(self.lowest, self.highest)

    def unclipped(self) -> IntegerGrid:
        """See `Grid`."""
        return replace(self, clip=False)

    def values(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes

    def positions(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def stored_scales(self, rows: int, columns: int) -> dict[str, Tensor]:
        """See `Grid`."""
        groups = 1 if self.granularity == "tensor" else columns // self.group_size
        shape = (rows, 1 if self.multiplier else groups)
        stored = {"weight_scale": torch.empty(shape, dtype=self.scale_dtype, device="meta")}
        if self.multiplier:
            many = torch.empty(rows, groups, dtype=torch.int8, device="meta")
            stored["weight_multiplier"] = many
        if not self.symmetric:
            stored["weight_zero_point"] = torch.empty(shape, dtype=torch.int8, device="meta")
        return stored

    def store(self, scales: Scales) -> dict[str, Tensor]:
        """See `Grid`."""
        names = ("weight_scale", "weight_multiplier", "weight_zero_point")
        tensors = zip(names, (scales.scale, scales.multiplier, scales.zero), strict=True)
        return {name: tensor.contiguous() for name, tensor in tensors if tensor is not None}

    def scales_of(self, stored: Mapping[str, Tensor | None], rows: int, columns: int) -> Scales:
        """See `Grid`."""
        scale = stored["weight_scale"]
        assert scale is not None
        return Scales(scale, stored.get("weight_multiplier"), stored.get("weight_zero_point"))

    def find_scales(self, weight: Tensor, largest: float | None = None) -> Scales:
        """See `Grid`; no tensor scale is shared."""
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


@dataclass(frozen=True)
class Scales:
    """The scales of a weight matrix.

    Attributes:
        scale: float32 (N, 1), or bfloat16 (N, G) where every group has its own; of floating-point
            grids float32.
        multiplier: int8 (N, G), or float32 (N, G) of floating-point grids with two levels of
            scales, or None.
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
        codes: int8 (N, K), in the order of their values.
        scales: of the codes.
        unrounded: float32 (N, K), the weights before rounding, for GPTQ with compensated errors;
            None where they are unknown.
        element: the codes' format, "int" or of `kernels.formats`.
    """

    codes: Tensor
    scales: Scales
    unrounded: Tensor | None = None
    element: str = "int"

    def to(self, device: torch.device) -> QuantizedWeight:
        """A copy on a device; the tensors themselves where they are on it."""
        scales = self.scales.map(lambda tensor: tensor.to(device))
        unrounded = None if self.unrounded is None else self.unrounded.to(device)
        return QuantizedWeight(self.codes.to(device), scales, unrounded, self.element)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ = (value − zero) · scale · multiplier, (N, K) in `dtype`."""
        columns, codes = self.codes.shape[1], self.codes.to(dtype)
        if self.element in FORMATS:
            codes = FORMATS[self.element].values(codes)
        zero = self.scales.zero_by_column(columns, dtype)
        if zero is not None:
            codes = codes - zero
        return codes * self.scales.step_by_column(columns, dtype)
