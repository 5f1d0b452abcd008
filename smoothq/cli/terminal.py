"""What the terminal shows: tables, progress, log lines."""

from __future__ import annotations

import codecs
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
log = logging.getLogger("smoothq")


def show_what_can_be_shown() -> None:
    """Let characters that the terminal or pipe has no code for come out replaced.

    Else a run that is done would end in an error over the arrow in its last line.
    """
    codecs.register_error(_REPLACEMENT, _replacement)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_REPLACEMENT)


_REPLACEMENT = "smoothq.replace"
_IN_ASCII = str.maketrans({"→": "->", "…": "..."})


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_IN_ASCII)
    return text.encode("ascii", "replace").decode("ascii"), error.end


def show_log() -> None:
    """Send what smoothq logs to standard error."""
    handler: logging.Handler = logging.StreamHandler()
    if err.is_terminal:
        handler = RichHandler(console=err, show_path=False, show_time=False)
    log.handlers = [handler]
    log.setLevel(logging.INFO)


@contextmanager
def progress() -> Iterator[Any]:
    """A callback (done, total, stage): a bar on a terminal, plain lines anywhere else."""
    if not err.is_terminal:
        yield PlainProgress()
        return
    parts = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(done: int, total: int, stage: str) -> None:
            bar.update(task, completed=done, total=total, description=stage)

        yield update


class PlainProgress:
    """One line a block: for logs."""

    def __init__(self) -> None:
        self._start, self._last = time.perf_counter(), -1

    def __call__(self, done: int, total: int, stage: str) -> None:
        """`done` of `total` are behind us, and the next has entered `stage`."""
        if done == self._last:
            return
        self._last = done
        spent = time.perf_counter() - self._start
        left = f", {spent / done * (total - done):.0f} s left" if done else ""
        log.info("%d/%d %s, %.0f s%s", done + 1, total, stage, spent, left)


def perplexity_so_far(update: Any) -> Callable[[int, int, float], None]:
    """What a measurement of perplexity reports, as progress."""
    return lambda done, total, so_far: update(done - 1, total, f"perplexity {so_far:.2f}")
