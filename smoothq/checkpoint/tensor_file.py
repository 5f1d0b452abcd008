"""Raw tensors one after another in a file, written and read back one at a time.

Reading copies into newly allocated memory instead of mapping the file: pages of a mapping count as
resident memory of the process for as long as the mapping lives.
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

from ..runtime.mapped import touch

DIGITS = 32  # hexadecimal digits kept of a tensor's SHA-256: 128 bits
COPY_BYTES = 16 << 20  # read at a time for copying or hashing


class Entry(BaseModel, frozen=True):
    """A tensor in a file.

    Attributes:
        dtype: PyTorch's name, such as `bfloat16`.
        shape: of the tensor.
        offset: of its first byte in the file.
        nbytes: its length in bytes.
        sha256: the first 128 bits of its bytes' SHA-256, in hexadecimal.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch.dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class TensorFile:
    """A file to which raw tensors are appended, and from which they are read."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Create a file, or open an existing one.

        Args:
            path: of the file.
            length: bytes of the existing file to keep, the rest is cut off; 0 starts an empty file.

        Raises:
            OSError: if the file cannot be opened or is shorter than `length`.
        """
        self.path = path
        self._file = open(path, "r+b" if length else "w+b")  # noqa: SIM115 (open as long as this)
        if os.fstat(self._file.fileno()).st_size < length:
            raise OSError(f"{path} is shorter than the {length} bytes that were written to it")
        self._file.truncate(length)
        self.length = length

    def append(self, rows: Iterable[Tensor], shape: tuple[int, ...]) -> Entry:
        """Append a tensor and return its entry.

        Args:
            rows: chunks of the tensor along its first axis, in order; or the whole tensor.
            shape: of the whole tensor.
        """
        start, digest, dtype = self.length, hashlib.sha256(), torch.float32
        self._file.seek(start)
        for part in rows:
            touch(part)
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
        """Read a tensor into new memory, on the CPU."""
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._file.flush()
        self._file.seek(entry.offset)
        self._file.readinto(as_bytes(buffer))
        return buffer.view(entry.torch_dtype).view(entry.shape)

    def blocks(self, entry: Entry) -> Iterator[bytes]:
        """The bytes of a tensor, `COPY_BYTES` at a time."""
        self._file.flush()
        return blocks_of(self._file, entry.offset, entry.nbytes)

    def sync(self) -> None:
        """Flush everything to the disk (fsync)."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays on the disk."""
        self._file.close()


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes; a contiguous CPU tensor is not copied."""
    whole = tensor.detach().to("cpu").contiguous()
    # The stride of a single element may be any.
    flat: Any = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()
    return memoryview(flat)


def blocks_of(file: BinaryIO, offset: int, nbytes: int) -> Iterator[bytes]:
    """The bytes of a range of a file, `COPY_BYTES` at a time.

    Raises:
        OSError: if the file ends within the range.
    """
    file.seek(offset)
    while nbytes:
        block = file.read(min(nbytes, COPY_BYTES))
        if not block:
            raise OSError(f"{file.name} ends within a tensor")
        nbytes -= len(block)
        yield block


def is_intact(blocks: Iterable[bytes | memoryview], sha256: str) -> bool:
    """Whether a tensor's bytes, given in order, have the hash `Entry.sha256`."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()[:DIGITS] == sha256
