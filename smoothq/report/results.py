"""What a run or an export came to or will take, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimeEstimate:
    """operations: float32 ones, a product of (M, K) and (K, N) being 2 MKN. seconds: estimated."""

    operations: float
    seconds: float


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes that a run takes at most. memory: of the process, libraries included.

    states_on_disk: hidden states are held in files, for want of memory.
    """

    memory: int
    disk: int
    states_on_disk: bool


def duration_text(seconds: float) -> str:
    """A duration as one would say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class ExportResult:
    """What an export came to.

    bytes_before: of the checkpoint's files. bytes_after: of all tensors. added_bytes: of the head
    that untying added. schemes: of how many linears each is, by a short name such as `W4A16 group
    32`. left_out: tensors that read the model where it is rotated, and are not exported. repeated:
    the output was there, made of just this, and nothing was done.
    """

    bytes_before: int
    bytes_after: int
    added_bytes: int
    schemes: dict[str, int]
    seconds: float
    left_out: tuple[str, ...] = ()
    repeated: bool = False
