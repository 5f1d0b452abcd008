"""Stored tensors of which some are quantized: these are decoded while they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..stored import WeightFiles
from ..weight_files import Spec
from .format import EncodedWeight, Format

CHUNK_ELEMENTS = 4 << 20  # decoded at a time: float32 beside what is kept
FLOATS_WITH_SCALES = frozenset(
    getattr(torch, name) for name in dir(torch) if name.startswith(("float8", "float4"))
)


class DecodedTensors:
    """The tensors of weight files, quantized ones decoded, under a float checkpoint's names."""

    def __init__(self, files: WeightFiles, format: Format, source: str) -> None:
        """Find the quantized weights; none is read.

        Args:
            files: tensors as they are stored.
            format: of those that are quantized.
            source: name of the model, for messages.

        Raises:
            CheckpointError: for a file that is not what the config says.
        """
        self._files = files
        self._weights = {weight.name: weight for weight in format.weights(files)}
        if not self._weights:
            raise CheckpointError(
                f"{source}: its config says that it is {format.label}, but no tensor is; if its "
                "weights are floats, remove its quantization_config"
            )
        parts = {part for weight in self._weights.values() for part in weight.parts}
        modules = {name.rpartition(".")[0] for name in self._weights}
        self.specs: dict[str, Spec] = {
            name: spec
            for name, spec in files.specs.items()
            if name not in parts and not _is_beside(name, modules, format.beside)
        }
        for name, spec in self.specs.items():
            if spec.dtype in FLOATS_WITH_SCALES:
                raise CheckpointError(
                    f"{source}: tensor '{name}' is stored as {spec.dtype} without the scale that "
                    f"{format.label} has; the checkpoint is incomplete, or of another format"
                )
        self.specs |= {name: weight.spec for name, weight in self._weights.items()}

    def place(self, name: str) -> str:
        """The path of the file with a tensor, or with a weight's codes."""
        return self._files.place(self._weights[name].codes if name in self._weights else name)

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored, or decoded."""
        if name not in self._weights:
            return self._files.tensor(name)
        weight = self._weights[name]
        decoded, first = torch.empty(weight.spec.shape, dtype=weight.spec.dtype), 0
        for rows in self._decoded(weight, self._chunk(weight)):
            decoded[first : first + len(rows)] = rows
            first += len(rows)
        return decoded

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A tensor in chunks of `count` rows, of which one is decoded at a time."""
        if name not in self._weights:
            yield from self._files.rows(name, count)
        else:
            yield from self._decoded(self._weights[name], count)

    def _decoded(self, weight: EncodedWeight, count: int) -> Iterator[Tensor]:
        size = weight.spec.shape[0]
        for first in range(0, size, count):
            yield weight.rows(self._files, first, min(first + count, size))

    @staticmethod
    def _chunk(weight: EncodedWeight) -> int:
        """How many rows of a weight are decoded at a time."""
        return max(1, CHUNK_ELEMENTS // math.prod(weight.spec.shape[1:]))


def _is_beside(name: str, modules: set[str], beside: tuple[str, ...]) -> bool:
    """Whether a tensor is of a module with a quantized weight, but not of the weight."""
    module, _, leaf = name.rpartition(".")
    return leaf in beside and module in modules
