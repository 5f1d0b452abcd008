"""What is written block by block in a distributed run: rank 0 writes, every rank calls.

Every method is to be called on all ranks, in the same order. What a `CheckpointWriter` does once in
a run, rank 0 does by `World.broadcast_from`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

from torch import Tensor

from ..checkpoint.writer import CheckpointWriter
from ..runtime.distributed import World
from .hidden_states import HiddenStates


class SharedWriter:
    """A `CheckpointWriter`'s tensors and states, of which rank 0 writes what all ranks give."""

    def __init__(self, writer: CheckpointWriter, world: World) -> None:
        """Wrap a writer, which acts on rank 0 only."""
        self._writer, self._world = writer, world

    def __enter__(self) -> Self:
        self._world.broadcast_from(self._enter)
        return self

    def _enter(self) -> None:
        self._writer.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._world.is_main:
            self._writer.__exit__(*error)

    def stream(self, name: str) -> Iterator[Tensor] | None:
        """The saved hidden states named `name`, to resume from, on rank 0; None on other ranks."""
        return self._writer.stream(name) if self._world.is_main else None

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write tensors by full name, on rank 0."""
        if self._world.is_main:
            self._writer.add(tensors)

    def add_rows(
        self, name: str, rows: Iterable[Tensor], shape: tuple[int, ...], nbytes: int
    ) -> None:
        """Write one tensor that is given in chunks of rows, on rank 0.

        Args:
            name: its full name.
            rows: the chunks in order.
            shape: the shape of the whole tensor.
            nbytes: its size in bytes.
        """
        if self._world.is_main:
            self._writer.add_rows(name, rows, shape, nbytes)

    def block_done(self, finished: int, blocks: int, streams: dict[str, HiddenStates]) -> None:
        """Save a state to resume from, after every `writer.every` blocks but not after the last.

        Nor between two calls of a block that the model calls several times.

        Args:
            finished: how many blocks are done.
            blocks: how many blocks the model has.
            streams: the hidden states that enter the next block, by name.
        """
        if finished % self._writer.every or finished == blocks:
            return
        if not all(stream.resumable for stream in streams.values()):
            return
        if self._world.is_main:
            self._writer.commit(finished, streams)
            return
        for stream in streams.values():
            for _ in stream:  # collective: each rank sends its micro-batches to rank 0
                pass
