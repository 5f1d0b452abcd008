"""Callbacks that report the progress of long work."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Callback that is called when a pass over the blocks enters a stage."""

    def __call__(self, block: int, blocks: int, stage: str) -> None:
        """Report that a stage begins.

        Args:
            block: index of the block, from 0.
            blocks: number of blocks.
            stage: name of the stage, such as `export`.
        """


class Stage(Protocol):
    """Callback that is called when a stage of the current block begins."""

    def __call__(self, stage: str) -> None:
        """Report that the stage of this name begins."""


def silent(block: int, blocks: int, stage: str) -> None:
    """A `Progress` that reports nothing."""
