"""Figures of a run or an export, and estimates of a planned run, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.plan import Bits
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class TimeEstimate:
    """The estimated time of a run.

    Attributes:
        operations: float32 operations; a product of (M, K) and (K, N) counts 2·M·K·N.
        seconds: the time that they take on the measured device.
    """

    operations: float
    seconds: float


@dataclass(frozen=True)
class ResourceEstimate:
    """The estimated peak memory and disk space of a run.

    Attributes:
        memory: bytes of the whole process, libraries included.
        disk: bytes of the output and of temporary files.
        states_on_disk: whether hidden states are stored in files because memory is too small.
    """

    memory: int
    disk: int
    states_on_disk: bool


def duration_text(seconds: float) -> str:
    """A duration as text with one unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class QuantizeResult:
    """The figures of a quantization.

    Attributes:
        name: the source model's name.
        recipe: the recipe as it was applied.
        bits: average bits per weight, activation and cached number.
        bytes_before: bytes of all tensors of the source.
        bytes_after: bytes of all tensors of the output.
        linear_bytes: bytes of the quantized linears' weights, with scales.
        seconds: duration of the run.
        peak_memory: bytes of the whole process, libraries included.
        notes: messages for the user, one line each.
        repeated: whether a complete output of the same model, recipe and data existed already, so
            that nothing was done.
    """

    name: str
    recipe: Recipe
    bits: Bits
    bytes_before: int
    bytes_after: int
    linear_bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]
    repeated: bool = False


@dataclass(frozen=True)
class ExportResult:
    """The figures of an export.

    Attributes:
        bytes_before: bytes of the checkpoint's files.
        bytes_after: bytes of all exported tensors.
        added_bytes: bytes of the head, if it was tied to the embedding and is now a tensor of its
            own.
        schemes: a scheme's short name, such as `W4A16 group 32` → number of linears.
        seconds: duration of the export.
        left_out: extra tensors that are not exported because they read rotated hidden states.
        repeated: whether a complete output of the same export existed already, so that nothing was
            done.
    """

    bytes_before: int
    bytes_after: int
    added_bytes: int
    schemes: dict[str, int]
    seconds: float
    left_out: tuple[str, ...] = ()
    repeated: bool = False
