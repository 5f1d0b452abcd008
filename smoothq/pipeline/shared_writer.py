"""The output of a run of several processes: the leading one writes it, all know how far it is."""

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
    """A `CheckpointWriter` for all processes of a run: all call it, the leading one acts."""

    def __init__(self, writer: CheckpointWriter, world: World) -> None:
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
        """The state to go on from."""
        return self._world.broadcast_from(lambda: self._writer.begin(identity, surroundings))

    def stream(self, name: str) -> Iterator[Tensor] | None:
        """The hidden states that were kept, where they can be read: in the leading process."""
        return self._writer.stream(name) if self._world.is_main else None

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Store tensors."""
        if self._world.is_main:
            self._writer.add(tensors)

    def add_rows(
        self, name: str, rows: Iterable[Tensor], shape: tuple[int, ...], nbytes: int
    ) -> None:
        """Store a tensor that comes in stretches of its rows."""
        if self._world.is_main:
            self._writer.add_rows(name, rows, shape, nbytes)

    def block_done(self, finished: int, blocks: int, streams: dict[str, HiddenStates]) -> None:
        """Keep what a next run needs, where it is time for that."""
        if finished % self._writer.every or finished == blocks:
            return
        if self._world.is_main:
            self._writer.commit(finished, streams)
            return
        for stream in streams.values():
            for number in range(len(stream)):
                stream.batch(number)  # every process hands over its share

    def is_finished(
        self, identity: RunKey, config: PretrainedConfig, side_files: SideFiles
    ) -> bool:
        """Whether the output is there already, whole and made of just this."""
        return self._world.broadcast_from(
            lambda: self._writer.is_finished(identity, config, side_files)
        )

    def assemble(self, config: PretrainedConfig, side_files: SideFiles, card: str) -> Path:
        """The whole checkpoint, in a directory that is not the output yet; known to all."""
        return self._world.broadcast_from(lambda: self._writer.assemble(config, side_files, card))

    def check(self, account: Account, assembled: Path) -> None:
        """Raise OutputError unless what was assembled holds what an account says."""
        self._world.broadcast_from(lambda: check_files(account, assembled))

    def place(self) -> None:
        """Make what was assembled the output; it is in place when this returns, in any process."""
        self._world.broadcast_from(self._writer.place)
