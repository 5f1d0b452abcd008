"""The memory of this process: what it has taken, and how it is given back."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's names for `mallopt`
STEADY = 1 << 20
APART = 64 << 10
USUAL = 32 << 20  # where glibc's own adaptation ends in a process with large tensors


def peak_memory() -> int:
    """Bytes that this process has taken at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def spare_memory() -> int:
    """Bytes that this process can take without taking more than it once had; 0 where unknown."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
    return max(0, peak_memory() - resident)


def give_back() -> None:
    """Return freed memory to the system."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def steady_heap() -> Iterator[None]:
    """Within it, freed tensors leave the process at once.

    glibc would learn to keep them in a heap, which the tensors of one block after another fragment.
    """
    with _threshold(STEADY):
        yield


@contextmanager
def busy_heap() -> Iterator[None]:
    """Within it, freed tensors stay for the next ones: forwards would fault in every page anew."""
    with _threshold(USUAL):
        yield


@contextmanager
def outside_heap() -> Iterator[None]:
    """Within it, tensors stand outside the heap: in it, what stays keeps the holes around it."""
    with _threshold(APART):
        yield


# In bytes, of the contexts that are open in all threads: larger tensors are mapped. There is one
# heap, so the context that was opened last decides until it is closed.
_thresholds: dict[object, int] = {}
_changing = threading.Lock()


@contextmanager
def _threshold(value: int) -> Iterator[None]:
    adjust = _of_libc("mallopt")
    if adjust is None:
        yield
        return
    context = object()
    with _changing:
        _thresholds[context] = value
        _apply(adjust)
    try:
        yield
    finally:
        with _changing:
            del _thresholds[context]
            _apply(adjust)


def _apply(adjust: Any) -> None:
    threshold = [USUAL, *_thresholds.values()][-1]
    adjust(_MMAP_THRESHOLD, threshold)
    adjust(_TRIM_THRESHOLD, 2 * threshold)


def _of_libc(name: str) -> Any:
    """A function of the C library; None where that has no such."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
