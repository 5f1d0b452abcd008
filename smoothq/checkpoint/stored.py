"""A checkpoint's tensors by their stored names, before they are matched with a model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from .weight_files import Spec, copies, read_part, read_rows, read_tensor, tensor_shapes


class StoredTensors(Protocol):
    """Tensors by stored name.

    Attributes:
        specs: shape and dtype by name.
    """

    specs: dict[str, Spec]

    def place(self, name: str) -> str:
        """A sort key by which tensors of one file stand together."""

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU; copy it to keep it."""

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A tensor in chunks of `count` rows, of which the last may be shorter."""


class WeightFiles:
    """The tensors of weight files, as they are stored."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: stored name → file."""
        self._files = files
        self.specs: dict[str, Spec] = {
            name: spec
            for path in sorted(set(files.values()))
            for name, spec in tensor_shapes(path).items()
        }

    def place(self, name: str) -> str:
        """The path of a tensor's file."""
        return str(self._files[name])

    def tensor(self, name: str) -> Tensor:
        """A tensor; its file stays mapped while the tensor lives."""
        return read_tensor(self._files[name], name)

    def part(self, name: str, *index: slice) -> Tensor:
        """A part of a tensor; index: what to take along its first axes."""
        return read_part(self._files[name], name, *index)

    def together(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Small tensors by name, copied; each file is opened once."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._files[name], []).append(name)
        return {
            name: tensor for path, keys in wanted.items() for name, tensor in copies(path, keys)
        }

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A tensor in chunks of `count` rows."""
        return read_rows(self._files[name], name, count)
