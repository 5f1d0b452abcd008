"""Safetensors shards written tensor by tensor, without keeping tensors in memory.

A safetensors header precedes the data and lists every tensor. So the tensors of a shard are
appended to a raw file (`shard-NNNNN.data`), and a full shard is copied behind its header into
`shard-NNNNN.safetensors`. A run resumes from `ShardState`: the tensors of the closed shards, and
those that were completely written to the open one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from ..errors import CheckpointError
from .tensor_file import Entry, TensorFile, blocks_of, is_intact
from .weight_files import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardState(BaseModel):
    """Which tensors have been written.

    Attributes:
        shards: for each shard, its tensors by name.
        open: whether the last shard is still a raw file to which tensors are appended.
    """

    shards: list[dict[str, Entry]] = []
    open: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for shard in self.shards for entry in shard.values())


class ShardWriter:
    """Writes tensors to the shards of a directory, resuming from a state."""

    def __init__(self, directory: Path, state: ShardState, shard_bytes: int = SHARD_BYTES) -> None:
        """Open a directory and check its shards against the state.

        Args:
            directory: where the shards are; files that the state does not list are removed.
            state: what has been written; the writer updates it in place.
            shard_bytes: size of a shard's tensors above which the next one begins.

        Raises:
            CheckpointError: if a stored tensor's hash differs from the state.
            OSError: if a file cannot be read.
        """
        self.directory, self.state = directory, state
        self._shard_bytes = shard_bytes
        self._data: TensorFile | None = None
        for number, shard in enumerate(state.shards):
            if state.open and number == len(state.shards) - 1:
                length = sum(entry.nbytes for entry in shard.values())
                self._data = TensorFile(self._path(number, "data"), length)
                _check_data(self._data, shard)
            else:
                self._path(number, "data").unlink(missing_ok=True)
                _check_shard(self._path(number), shard)
        for path in directory.glob("shard-*"):
            if int(path.stem.rpartition("-")[2]) >= len(state.shards):
                path.unlink()  # begun after the state was saved

    def add(self, name: str, rows: Iterable[Tensor], shape: tuple[int, ...], nbytes: int) -> None:
        """Append a tensor, closing the open shard first if the tensor does not fit.

        Args:
            name: of the tensor in the checkpoint.
            rows: chunks of the tensor along its first axis, in order; or the whole tensor.
            shape: of the whole tensor.
            nbytes: of the whole tensor.
        """
        open_bytes = 0 if self._data is None else self._data.length
        if open_bytes and open_bytes + nbytes > self._shard_bytes:
            self._close()
        if self._data is None:
            self._data = TensorFile(self._path(len(self.state.shards), "data"))
            self.state.shards.append({})
            self.state.open = True
        self.state.shards[-1][name] = self._data.append(rows, shape)

    def sync(self) -> None:
        """Flush all added tensors to the disk (fsync)."""
        if self._data is not None:
            self._data.sync()

    def forget_copied(self) -> None:
        """Remove the raw files of closed shards; call after the state has been saved."""
        for number in range(len(self.state.shards) - self.state.open):
            self._path(number, "data").unlink(missing_ok=True)

    def finish(self, final: Path) -> None:
        """Close the last shard and move all shards to `final` under transformers' file names.

        Of several shards the index file is written too.
        """
        self._close()
        names = final_names(len(self.state.shards))
        for number, name in enumerate(names):
            os.replace(self._path(number), final / name)
        if len(names) > 1:
            shards = zip(names, self.state.shards, strict=True)
            index: dict[str, Any] = {
                "metadata": {"total_size": self.state.nbytes},
                "weight_map": {name: file for file, shard in shards for name in shard},
            }
            (final / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    @staticmethod
    def take_back(final: Path, directory: Path) -> None:
        """Undo `finish`: move the shards from `final` back to `directory`, and delete `final`."""
        if not final.is_dir():
            return
        for path in sorted(final.glob("*.safetensors")):
            number = 0 if path.name == SINGLE else int(path.stem.split("-")[1]) - 1
            os.replace(path, directory / shard_name(number))
        shutil.rmtree(final)

    def close(self) -> None:
        """Close the open raw file, which stays on the disk."""
        if self._data is not None:
            self._data.close()

    def _close(self) -> None:
        """Copy the open shard's raw file behind its header."""
        if self._data is None:
            return
        self._data.sync()
        number = len(self.state.shards) - 1
        with open(self._path(number), "wb") as file:
            file.writelines(_as_safetensors(self._data, self.state.shards[-1]))
            file.flush()
            os.fsync(file.fileno())
        self._data.close()
        self._data, self.state.open = None, False

    def _path(self, number: int, suffix: str = "safetensors") -> Path:
        return self.directory / shard_name(number, suffix)


def shard_name(number: int, suffix: str = "safetensors") -> str:
    """File name of a shard while the total number of shards is unknown."""
    return f"shard-{number:05d}.{suffix}"


def final_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers names them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def in_file_order(shard: dict[str, Entry]) -> list[tuple[str, Entry]]:
    """A shard's tensors in the order of its file: widest dtype first, so that all are aligned."""
    return sorted(shard.items(), key=lambda item: (-item[1].torch_dtype.itemsize, item[0]))


def _as_safetensors(data: TensorFile, shard: dict[str, Entry]) -> Iterator[bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in in_file_order(shard):
        offsets = [offset, offset + entry.nbytes]
        dtype = _NAMES[entry.torch_dtype]
        header[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, entry in in_file_order(shard):
        yield from data.blocks(entry)


def _check_data(data: TensorFile, shard: dict[str, Entry]) -> None:
    for name, entry in shard.items():
        if not is_intact(data.blocks(entry), entry.sha256):
            raise _changed(data.path, name)


def _check_shard(path: Path, shard: dict[str, Entry]) -> None:
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in in_file_order(shard):
            if not is_intact(blocks_of(file, start, entry.nbytes), entry.sha256):
                raise _changed(path, name)
            start += entry.nbytes


def _changed(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor '{name}' is not what was written there; begin anew with resume=False"
    )
