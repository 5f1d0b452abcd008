"""The memory of this process: its peak, and when glibc returns freed memory to the system."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import RecipeError

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # parameters of glibc's `mallopt`
# Values of M_MMAP_THRESHOLD in bytes. An allocation above it is mapped on its own (mmap) and
# unmapped when it is freed; a smaller one lies in the heap, where freed memory may be kept.
STEADY_THRESHOLD = 1 << 20
OUTSIDE_THRESHOLD = 64 << 10
DEFAULT_THRESHOLD = 32 << 20  # to which glibc raises it by itself in a process with large tensors


def parse_bytes(text: str) -> int:
    """A number of bytes: `8GB`, `8GiB` of powers of 1024, `500 MB`, `7.5e9`.

    Raises RecipeError for what is no amount of memory.
    """
    parts = re.fullmatch(r"([0-9.e+]+)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    try:
        if parts is None:
            raise ValueError(text)
        unit = 1024 if parts[3] else 1000
        return int(float(parts[1]) * unit ** " kmgt".index(parts[2] or " "))
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"'{text}' is no amount of memory; write it as 8GB") from error


def peak_memory() -> int:
    """The peak resident memory of this process so far, in bytes.

    Linux hands a parent's peak down to the processes that it starts; what it counts for a process
    itself is in /proc.
    """
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count kilobytes


def spare_memory() -> int:
    """Bytes between the present resident memory and its peak so far; 0 where that is unknown.

    So much can be allocated without a new peak.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
    return max(0, peak_memory() - resident)


def give_back() -> None:
    """Return freed memory of the heap to the system (glibc's `malloc_trim`)."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def steady_heap() -> Iterator[None]:
    """Context with M_MMAP_THRESHOLD at 1 MiB: freed tensors return to the system at once.

    Without it glibc raises the threshold to 32 MiB and keeps freed tensors in the heap, which the
    tensors of block after block fragment.
    """
    with _threshold(STEADY_THRESHOLD):
        yield


@contextmanager
def busy_heap() -> Iterator[None]:
    """Context with M_MMAP_THRESHOLD at 32 MiB: the next tensors reuse the memory of freed ones.

    For forwards and tuning. At 1 MiB every temporary tensor would be a new mapping, with a page
    fault for each of its pages.
    """
    with _threshold(DEFAULT_THRESHOLD):
        yield


@contextmanager
def outside_heap() -> Iterator[None]:
    """Context with M_MMAP_THRESHOLD at 64 KiB: for tensors that outlive their neighbours.

    In the heap such a tensor keeps the memory of temporaries around it from being returned: the
    quantization of a model took up to a fifth more memory.
    """
    with _threshold(OUTSIDE_THRESHOLD):
        yield


# The thresholds of all open contexts, of all threads, in the order of opening. The process has one
# heap setting, so the context that was opened last decides until it is closed.
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
    threshold = [DEFAULT_THRESHOLD, *_thresholds.values()][-1]
    adjust(_M_MMAP_THRESHOLD, threshold)
    adjust(_M_TRIM_THRESHOLD, 2 * threshold)


def _of_libc(name: str) -> Any:
    """A function of the C library by name; None where the library does not have it."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
