"""What a format of quantized weights is: which stored tensors make up a weight, and its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..stored import WeightFiles
from ..weight_files import Spec
from .bits import fp8

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Blocks = tuple[int, int]  # rows and columns that share a scale


@dataclass(frozen=True)
class EncodedWeight(ABC):
    """A weight that is stored in several tensors.

    Attributes:
        name: that it has in a float checkpoint.
        spec: of what it decodes to.
        codes: stored name of its codes.
    """

    name: str
    spec: Spec
    codes: str

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """The stored names of all tensors that it is made of."""

    @abstractmethod
    def rows(self, files: WeightFiles, first: int, last: int) -> Tensor:
        """Its rows `first` to `last` along the first axis, decoded."""


@dataclass(frozen=True)
class ScaledWeight(EncodedWeight):
    """A matrix, or a stack of matrices, of codes with a scale for each block of a matrix.

    It decodes to (code - zero point) · scale in the dtype that the scale has after `scale_values`,
    as its writer computes it, and that is cast.

    Attributes:
        scale: stored name of the scales.
        blocks: rows and columns that share one; the last of either may be shorter.
        zeros: stored name of the zero points, of which every scale has one; None has none.
        order: stored name of the column of scales that each column takes; None takes blocks.
        computed: dtype of the writer's result, before it is cast; None for the scale's.
    """

    scale: str
    blocks: Blocks
    zeros: str | None = None
    order: str | None = None
    computed: torch.dtype | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Codes, scales, zero points and the order of columns."""
        return tuple(filter(None, (self.codes, self.scale, self.zeros, self.order)))

    def rows(self, files: WeightFiles, first: int, last: int) -> Tensor:
        """As `EncodedWeight.rows`; of a stack these are matrices."""
        codes = self.code_values(files, first, last)
        scale = self.scale_values(files, self._scales(self.scale_grid(files), first, last))
        columns = self._columns(files)
        # A scale a row is broadcast, not repeated.
        wide = scale.shape[-1] > 1 and (self.blocks[1] > 1 or self.order is not None)
        decoded = codes.to(scale.dtype)
        if self.zeros is not None:
            zeros = self._scales(self.zero_grid(files), first, last)
            decoded -= (zeros.index_select(-1, columns) if wide else zeros).to(scale.dtype)
        decoded *= scale.index_select(-1, columns) if wide else scale
        return decoded.to(self.computed or scale.dtype).to(self.spec.dtype)

    def _columns(self, files: WeightFiles) -> Tensor:
        """The column of scales that each column of the matrix takes: int64 (columns,)."""
        if self.order is not None:
            order = files.tensor(self.order).to(torch.int64)
            if bool((order >= 0).all()):  # an order that was never set is -1
                return order
        return torch.arange(self.spec.shape[-1]) // self.blocks[1]

    def _scales(self, grid: Tensor, first: int, last: int) -> Tensor:
        """The rows of a grid of scales that belong to rows of the weight."""
        if len(self.spec.shape) > 2:
            grid = grid[first:last] if len(grid) > 1 else grid
            first, last = 0, self.spec.shape[-2]
        if grid.shape[-2] == 1:
            return grid
        return grid.index_select(-2, torch.arange(first, last) // self.blocks[0])

    def code_values(self, files: WeightFiles, first: int, last: int) -> Tensor:
        """The codes of rows `first` to `last`, in any dtype: (last - first, ..., columns)."""
        codes = files.part(self.codes, slice(first, last))
        return fp8(codes) if codes.dtype in FP8 else codes

    def scale_grid(self, files: WeightFiles) -> Tensor:
        """The scales as they are stored: (..., blocks of rows, blocks of columns)."""
        return as_grid(files.tensor(self.scale), self.spec.shape)

    def scale_values(self, files: WeightFiles, stored: Tensor) -> Tensor:  # noqa: ARG002
        """What stored scales stand for, in the dtype in which the product is computed."""
        return stored

    def zero_grid(self, files: WeightFiles) -> Tensor:
        """The zero points, in any dtype, of the shape of `scale_grid`."""
        assert self.zeros is not None
        return as_grid(files.tensor(self.zeros), self.spec.shape)


class Format(ABC):
    """A format of quantized weights, as a model's config describes it.

    Attributes:
        label: what is read, for people.
        dtype: that weights decode to.
        beside: what a module with such a weight stores that says nothing of the weight, such as
            the scale of its inputs.
    """

    beside: ClassVar[tuple[str, ...]] = ("input_scale", "activation_scale", "input_global_scale")

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, name: str) -> None:
        """Keep what a config says.

        Args:
            config: `quantization_config` of the model's config.
            dtype: that weights decode to.
            name: of the model, for messages.

        Raises:
            UnsupportedModelError: for a form of the format that is not decoded.
        """
        self.config, self.dtype, self.name = config, dtype, name
        self.label = self.read(config)

    @abstractmethod
    def read(self, config: dict[str, Any]) -> str:
        """The label of what a config describes. Raises as `__init__`."""

    @abstractmethod
    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """The weights that are stored in this format.

        Raises:
            CheckpointError: for tensors that do not fit one another.
        """

    @property
    def note(self) -> str:
        """One line for the user."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"the source is {self.label}: decoded to {kind} while it is read"

    def misfit(self, tensor: str, shape: Iterable[int], scale: Iterable[int]) -> CheckpointError:
        """The error for scales that do not fit a weight.

        Args:
            tensor: stored name of the scales.
            shape: of the weight.
            scale: shape of the scales.
        """
        return CheckpointError(
            f"{self.name}: '{tensor}' has shape {tuple(scale)}, which divides a weight of shape "
            f"{tuple(shape)} into no blocks; the file is damaged, or of a format that is not read"
        )

    def blocks(
        self, scale: str, shape: tuple[int, ...], stored: tuple[int, ...], *known: Blocks
    ) -> Blocks:
        """The rows and columns of a weight that share a scale.

        Args:
            scale: stored name of the scales.
            shape: of the weight.
            stored: shape of the scales.
            known: blocks that the config names; without one that fits they divide evenly.

        Raises:
            CheckpointError: for scales that do not fit the weight.
        """
        sizes, counts = shape[-2:], grid_of(stored, shape)[-2:]
        for blocks in known:
            if all(
                -(-size // block) == n for size, block, n in zip(sizes, blocks, counts, strict=True)
            ):
                return blocks
        if 0 in counts or any(size % count for size, count in zip(sizes, counts, strict=True)):
            raise self.misfit(scale, shape, stored)
        rows, columns = (size // count for size, count in zip(sizes, counts, strict=True))
        return rows, columns


def grid_of(stored: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales as a grid of blocks of each matrix.

    Args:
        stored: shape of the scales: none or one number of a matrix, one a row, or a grid.
        shape: of the weight.
    """
    if len(stored) == len(shape):
        return stored
    if len(shape) > 2 and stored == shape[:1]:
        return (*stored, 1, 1)
    if len(stored) == 1 and stored[0] > 1:
        return (*stored, 1)
    return (1,) * (len(shape) - len(stored)) + stored


def as_grid(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales as a grid of blocks of each matrix; shape: of the weight."""
    return scales.reshape(grid_of(tuple(scales.shape), shape))
