"""A facade of `CheckpointWriter` for distributed runs: rank 0 writes, every rank calls.

Every method is to be called on all ranks, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor
from transformers import PretrainedConfig

from ..checkpoint.manifest import RunKey
from ..checkpoint.side_files import SideFiles
from ..checkpoint.writer import CheckpointWriter, Environment, State
from ..plan.account import Account, check_files
from ..runtime.distributed import World
from .hidden_states import HiddenStates


class SharedWriter:
    """A `CheckpointWriter` for a distributed run: all ranks call its methods, rank 0 writes.

    An error on rank 0 in `begin`, `is_finished`, `assemble`, `check` or `place`, or on entering, is
    raised on every rank.
    """

    def __init__(self, writer: CheckpointWriter, world: World) -> None:
        """Wrap a writer, which acts on rank 0 only."""
        self._writer, self._world = writer, world

    def __enter__(self) -> Self:
        self._world.broadcast_from(self._enter)
        return self

    def _enter(self) -> None:
        self._writer.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._world.is_main:
            self._writer.__exit__(kind, error, trace)

    def begin(self, identity: RunKey, surroundings: Environment) -> State:
        """Begin or resume the output, on rank 0; the stored state on every rank.

        Args:
            identity: hashes of everything that the output depends on; a state of another run is
                not resumed.
            surroundings: the environment of the run, recorded with the state.
        """
        return self._world.broadcast_from(lambda: self._writer.begin(identity, surroundings))

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

        Args:
            finished: how many blocks are done.
            blocks: how many blocks the model has.
            streams: the hidden states that enter the next block, by name.
        """
        if finished % self._writer.every or finished == blocks:
            return
        if self._world.is_main:
            self._writer.commit(finished, streams)
            return
        for stream in streams.values():
            for number in range(len(stream)):
                stream.batch(number)  # collective: each rank sends its micro-batches to rank 0

    def is_finished(
        self, identity: RunKey, config: PretrainedConfig, side_files: SideFiles
    ) -> bool:
        """Whether a complete output of the same model, recipe and data already exists."""
        return self._world.broadcast_from(
            lambda: self._writer.is_finished(identity, config, side_files)
        )

    def assemble(self, config: PretrainedConfig, side_files: SideFiles, card: str) -> Path:
        """Write config, side files and model card beside the weights, on rank 0.

        Returns: on every rank, the directory of the complete checkpoint, not yet renamed to the
        output.
        """
        return self._world.broadcast_from(lambda: self._writer.assemble(config, side_files, card))

    def check(self, account: Account, assembled: Path) -> None:
        """Compare the tensors of the assembled checkpoint with the account.

        Raises:
            OutputError: on every rank, if names, shapes or dtypes differ.
        """
        self._world.broadcast_from(lambda: check_files(account, assembled))

    def place(self) -> None:
        """Rename the assembled checkpoint to the output; done when this returns on any rank."""
        self._world.broadcast_from(self._writer.place)
