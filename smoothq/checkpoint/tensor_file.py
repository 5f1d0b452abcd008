"""Tensors one after the other in a file, written and read back one at a time.

What is read is copied into memory of its own: a mapped file's pages would count as ours for as long
as the mapping lives.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel
from torch import Tensor

DIGITS = 32  # of a tensor's hash: as many as tell any two apart, in half the space
COPY_BYTES = 16 << 20  # what is read at a time to be copied or hashed


class Entry(BaseModel, frozen=True):
    """Where a tensor lies in a file, what it is, and the first 128 bits of its bytes' SHA-256."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype as PyTorch's own."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class TensorFile:
    """A file of raw tensors that grows."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """length: bytes of an existing file that are kept; what lies behind them is cut off.

        Raises OSError where the file cannot be opened, or is shorter.
        """
        self.path = path
        self._file = open(path, "r+b" if length else "w+b")  # noqa: SIM115 (open as long as this)
        if os.fstat(self._file.fileno()).st_size < length:
            raise OSError(f"{path} is shorter than the {length} bytes that were written to it")
        self._file.truncate(length)
        self.length = length

    def append(self, rows: Iterable[Tensor], shape: tuple[int, ...]) -> Entry:
        """Write a tensor of a shape, given whole or by its rows in order."""
        start, digest, dtype = self.length, hashlib.sha256(), torch.float32
        self._file.seek(start)
        for part in rows:
            dtype, data = part.dtype, as_bytes(part)
            digest.update(data)
            self._file.write(data)
            self.length += len(data)
        name = str(dtype).removeprefix("torch.")
        return Entry(
            dtype=name,
            shape=shape,
            offset=start,
            nbytes=self.length - start,
            sha256=digest.hexdigest()[:DIGITS],
        )

    def read(self, entry: Entry) -> Tensor:
        """A tensor again, on the CPU."""
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._file.flush()
        self._file.seek(entry.offset)
        self._file.readinto(as_bytes(buffer))
        return buffer.view(entry.torch_dtype).view(entry.shape)

    def blocks(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of a tensor, a few megabytes at a time."""
        self._file.flush()
        return blocks_of(self._file, entry.offset, entry.nbytes)

    def sync(self) -> None:
        """Wait until the disk has everything."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays on the disk."""
        self._file.close()


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, on the CPU, without a copy where it lies there in one piece."""
    flat: Any = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def blocks_of(file: BinaryIO, offset: int, nbytes: int) -> Iterator[bytes]:
    """A stretch of a file, a few megabytes at a time. Raises OSError where the file ends in it."""
    file.seek(offset)
    while nbytes:
        block = file.read(min(nbytes, COPY_BYTES))
        if not block:
            raise OSError(f"{file.name} ends within a tensor")
        nbytes -= len(block)
        yield block


def is_intact(blocks: Iterable[bytes | memoryview], sha256: str) -> bool:
    """Whether a tensor's bytes have the hash of an `Entry`."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()[:DIGITS] == sha256
