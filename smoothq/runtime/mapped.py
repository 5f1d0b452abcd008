"""Tensors in files, of which only those used last are in memory.

A stack of experts may be many times larger than all else of its block, while one matrix after the
other is worked on. Its pages are given up when others are touched: the system keeps their content,
in memory as long as that is free, else in the file.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

RESIDENT_BYTES = 32 << 20  # of all mapped tensors together; more while one is in use

_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address
_touched: list[tuple[int, int, int]] = []  # address of a map, and first byte and end within it


def mapped_tensor(shape: Iterable[int], dtype: torch.dtype, directory: Path) -> Tensor:
    """A tensor of zeros in a file without a name, which is gone with the tensor.

    Args:
        shape: without zeros.
        dtype: of the tensor.
        directory: where the file is.
    """
    sizes = tuple(shape)
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(prod(sizes) * dtype.itemsize)
        pages = mmap.mmap(file.fileno(), 0)
    tensor = torch.frombuffer(pages, dtype=dtype).view(sizes)
    _maps[tensor.untyped_storage().data_ptr()] = pages
    return tensor


def mapped(tensor: Tensor, directory: Path) -> Tensor:
    """A mapped copy of a tensor without zeros in its shape."""
    copied = mapped_tensor(tensor.shape, tensor.dtype, directory)
    touch(copied)
    return copied.copy_(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of `mapped_tensor` or a part of one."""
    return tensor.is_cpu and tensor.untyped_storage().data_ptr() in _maps


def touch(tensor: Tensor) -> None:
    """Say that a part of a mapped tensor will be used now; of any other nothing happens.

    What was touched before it is given up where that is over `RESIDENT_BYTES`. A part that is
    given up is read again, as it was written, when it is next used.
    """
    if not _maps or not is_mapped(tensor):
        return
    address = tensor.untyped_storage().data_ptr()
    first = tensor.data_ptr() - address
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    _touched.append((address, first, first + (last + 1) * tensor.element_size()))
    if sum(end - start for _, start, end in _touched) > RESIDENT_BYTES:
        for part in _touched[:-1]:
            _give_up(*part)
        del _touched[:-1]


def _give_up(address: int, first: int, end: int) -> None:
    pages = _maps.get(address)
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        start = first - first % mmap.PAGESIZE
        pages.madvise(mmap.MADV_DONTNEED, start, end - start)
