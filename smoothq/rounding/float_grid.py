"""Floating-point grids of weights: FP8, MXFP8, MXFP4 and NVFP4.

A weight matrix (N, K) is rounded to ŵ_nk = v(q_nk) · s, v the value of a code of E4M3 or E2M1, and
s its scale: float32 by matrix, row, or block of 128 × 128 (FP8); a power of two by group (MX); or,
in two levels, E4M3 by group times a float32 of the matrix (NVFP4). Codes are ranks, from −highest
to highest, so that neighbours in value are neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from ..kernels.formats import (
    E4M3,
    E8M0_BIAS,
    FORMATS,
    FloatFormat,
    e4m3_bytes,
    e4m3_values,
    power_of_two,
    powers_of_two,
)
from ..kernels.reference import nonzero
from .grid import CHUNK_ELEMENTS, Grid, Scales, rows_at_once
from .packing import pack, unpack

BLOCK = 128  # rows and columns of a block that shares a scale
MOVED = (0, 1, -1)  # exponents of MX scales tried besides the rule's
FRACTIONS = (6.0, 4.0)  # the value that a group's maximum is taken to in NVFP4 (arXiv 2512.02010)
NEIGHBOURS = range(-2, 3)  # E4M3 scales tried around each of these
RATIOS = [1 - 0.05 * step for step in range(6)]  # of the maximum, tried for float32 scales

ScaleFormat = Literal["float", "e8m0", "e4m3"]


@dataclass(frozen=True)
class FloatGrid(Grid):
    """The floating-point grid of a weight matrix.

    Attributes:
        element: the codes' format, `e4m3` or `e2m1`.
        scale: the format of scales: float32, a power of two, or E4M3 times the matrix's float32.
        clip: scales minimise Σ |w − ŵ|^2.4; else they follow the format's rule for the maximum.
    """

    element: str = "e4m3"
    scale: ScaleFormat = "float"
    clip: bool = False

    @property
    def form(self) -> FloatFormat:
        """The format of the codes."""
        return FORMATS[self.element]

    @property
    def lowest(self) -> int:
        """See `Grid`."""
        return -self.highest

    @property
    def highest(self) -> int:
        """See `Grid`."""
        highest: int = self.form.highest
        return highest

    @property
    def learns_scales(self) -> bool:  # type: ignore[override]
        """See `Grid`: scales of groups have few values, and those of blocks are of many rows."""
        return self.scale == "float" and self.granularity == "channel"

    @property
    def shares_scale(self) -> bool:  # type: ignore[override]
        """See `Grid`."""
        return self.scale == "e4m3"

    @property
    def tried_scales(self) -> int:
        """See `Grid`."""
        counts = {"float": len(RATIOS), "e8m0": len(MOVED), "e4m3": 2 * len(NEIGHBOURS)}
        return counts[self.scale] if self.clip else 1

    def codes(self, weight: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """The ranks nearest to w / step; 0 where the step is 0."""
        assert zero is None
        ranks: Tensor = self.form.ranks(torch.where(step == 0, 0, weight / step))
        return ranks

    def unclipped(self) -> FloatGrid:
        """See `Grid`."""
        return replace(self, clip=False)

    def values(self, codes: Tensor) -> Tensor:
        """See `Grid`."""
        values: Tensor = self.form.values(codes)
        return values

    def positions(self, values: Tensor) -> Tensor:
        """See `Grid`."""
        positions: Tensor = self.form.positions(values)
        return positions

    def find_scales(self, weight: Tensor, largest: float | None = None) -> Scales:
        """See `Grid`."""
        weight = weight.float()
        match self.granularity:
            case "tensor":
                whole = self._float_scale(weight.reshape(1, 1, -1))
                return Scales(whole.expand(len(weight), 1).contiguous(), None)
            case "block":
                return Scales(self._of_blocks(weight), None)
        groups = weight.unflatten(-1, (-1, self.group_size))
        chunks = groups.split(rows_at_once(weight))
        if self.scale == "float":
            return Scales(torch.cat(list(map(self._float_scale, chunks))), None)
        if self.scale == "e8m0":
            return Scales(torch.cat(list(map(self._power_of_two, chunks))), None)
        most = weight.abs().amax().item() if largest is None else largest
        whole = weight.new_full((), most / (E4M3.largest * self.form.largest) or 1.0)
        parts = [self._e4m3(chunk, whole) for chunk in chunks]
        return Scales(whole.expand(len(weight), 1).contiguous(), torch.cat(parts))

    def _float_scale(self, groups: Tensor) -> Tensor:
        """(n, G, size) → float32 (n, G)."""
        full: Tensor = nonzero(groups.abs().amax(-1) / self.form.largest)
        if not self.clip:
            return full
        return self._least_error(groups, [full * ratio for ratio in RATIOS])

    def _power_of_two(self, groups: Tensor) -> Tensor:
        """(n, G, size) → powers of two, float32 (n, G)."""
        rule: Tensor = powers_of_two(power_of_two(groups.abs().amax(-1), self.form))
        if not self.clip:
            return rule
        return self._least_error(groups, [torch.ldexp(rule, torch.tensor(m)) for m in MOVED])

    def _e4m3(self, groups: Tensor, whole: Tensor) -> Tensor:
        """(n, G, size) → E4M3 numbers, float32 (n, G), which times `whole` are the scales."""
        most = groups.abs().amax(-1) / whole
        if not self.clip:
            return _e4m3(most / self.form.largest)
        steps = []
        for fraction in FRACTIONS:
            rank = E4M3.ranks(most / fraction)
            moved = [(rank + by).clamp(0, E4M3.highest) for by in NEIGHBOURS]
            steps += [E4M3.values(near) * whole for near in moved]
        return _e4m3(self._least_error(groups, steps) / whole)

    def _of_blocks(self, weight: Tensor) -> Tensor:
        """The scale of each row's group of `group_size` columns: float32 (N, G)."""
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
        numbers = blocks.reshape(-1, 1, BLOCK * BLOCK)
        chunks = numbers.split(max(1, CHUNK_ELEMENTS // numbers.shape[-1]))
        scale = torch.cat(list(map(self._float_scale, chunks))).view(blocks.shape[:2])
        return self._by_group(scale, rows, columns // self.group_size)

    def _by_group(self, blocks: Tensor, rows: int, groups: int) -> Tensor:
        """Numbers of blocks, (⌈N / 128⌉, ⌈K / 128⌉), by row and group."""
        by_row = blocks.repeat_interleave(BLOCK, 0)[:rows]
        return by_row.repeat_interleave(BLOCK // self.group_size, 1)[:, :groups].contiguous()

    def stored_scales(self, rows: int, columns: int) -> dict[str, Tensor]:
        """See `Grid`."""

        def like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        match self.granularity, self.scale:
            case "tensor", _:
                return {"weight_scale": like(1, 1)}
            case "block", _:
                return {"weight_scale": like(-(-rows // BLOCK), -(-columns // BLOCK))}
            case _, "float":
                return {"weight_scale": like(rows, columns // self.group_size)}
        groups = like(rows, columns // self.group_size, dtype=torch.uint8)
        if self.scale == "e8m0":
            return {"weight_scale": groups}
        return {"weight_scale": like(1, 1), "weight_multiplier": groups}

    def store(self, scales: Scales) -> dict[str, Tensor]:
        """See `Grid`."""
        scale = scales.scale
        match self.granularity, self.scale:
            case "tensor", _:
                return {"weight_scale": scale[:1].contiguous()}
            case "block", _:
                blocks = scale[::BLOCK, :: BLOCK // self.group_size]
                return {"weight_scale": blocks.contiguous()}
            case _, "float":
                return {"weight_scale": scale.contiguous()}
            case _, "e8m0":
                exponents = torch.frexp(scale).exponent - 1 + E8M0_BIAS
                return {"weight_scale": exponents.to(torch.uint8)}
        assert scales.multiplier is not None
        return {
            "weight_scale": scale[:1].contiguous(),
            "weight_multiplier": e4m3_bytes(scales.multiplier),
        }

    def scales_of(self, stored: Mapping[str, Tensor | None], rows: int, columns: int) -> Scales:
        """See `Grid`."""
        scale, multiplier = stored["weight_scale"], stored.get("weight_multiplier")
        assert scale is not None
        match self.granularity, self.scale:
            case "block", _:
                return Scales(self._by_group(scale, rows, columns // self.group_size), None)
            case _, "e8m0":
                return Scales(powers_of_two(scale), None)
        scale = scale.expand(rows, -1) if len(scale) == 1 else scale
        return Scales(scale, None if multiplier is None else e4m3_values(multiplier))

    def packed_like(self, rows: int, columns: int) -> Tensor:
        """See `Grid`: bytes (N, K, 1) of 8 bits, or two codes a byte as integers' are."""
        return super().packed_like(rows, columns).to(torch.uint8)

    def pack(self, codes: Tensor) -> Tensor:
        """See `Grid`."""
        return pack(self.form.codes(codes).view(torch.int8), self.bits).view(torch.uint8)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """See `Grid`."""
        codes = unpack(packed, columns, self.bits).view(torch.uint8)
        ranks: Tensor = self.form.ranks_of(codes & (2**self.bits - 1))
        return ranks


def _e4m3(x: Tensor) -> Tensor:
    """The E4M3 numbers nearest to x, float32."""
    rounded: Tensor = e4m3_values(e4m3_bytes(x))
    return rounded


def block_group(columns: int) -> int:
    """The columns of a group for scales of blocks: the largest number that divides both."""
    return gcd(BLOCK, columns)
