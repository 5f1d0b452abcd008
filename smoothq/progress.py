"""What is told of the progress of long work."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told where the pass is."""

    def __call__(self, block: int, blocks: int, stage: str) -> None:
        """Block `block` of `blocks` (from 0) has entered `stage`."""


class Stage(Protocol):
    """Told which stage of a block has begun."""

    def __call__(self, stage: str) -> None:
        """`stage` has begun."""


def silent(block: int, blocks: int, stage: str) -> None:
    """No progress is wanted."""
