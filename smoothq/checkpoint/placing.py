"""Where an output goes, and the last act, which puts it there.

Work goes to `OUT.partial`, and where there is no `OUT` the last act is one renaming. A directory
that is there is filled, never replaced: it may be a mount point or somebody's current directory.
What it held moves to `replaced`, its config first, then what was assembled moves in, the manifest
and the config last; so a directory with a config is never half of one. Where a renaming beside the
directory cannot be, work goes to `OUT/.partial`.

`placing` marks that this has begun, and `filling` that all of the old has moved out. A placing that
was stopped is undone from these before anything else is done.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError
from .manifest import MANIFEST

MARKS = ("placing", "filling")
LAST = (MANIFEST, "config.json")  # to come, and in turn the first to go
# Of a directory: what of it is no content. The last is the root of a file system's own.
_NO_CONTENT = frozenset({".partial", ".smoothq", ".smoothq.partial", "lost+found"})


class Place:
    """An output directory and the one that work for it goes to."""

    def __init__(self, out: Path) -> None:
        if out.name in ("", ".."):
            out = Path(os.path.abspath(out))
        self.out = out
        self.inside = out.is_dir() and not out.is_symlink() and not _can_have_siblings(out)
        self.partial = self.beside("partial")
        self.final = self.partial / "final"
        self._replaced = self.partial / "replaced"
        self._placing, self._filling = (self.partial / mark for mark in MARKS)

    def beside(self, name: str) -> Path:
        """A directory on the output's own file system, for work that leads to it."""
        return (
            self.out / f".{name}" if self.inside else self.out.with_name(f"{self.out.name}.{name}")
        )

    @property
    def disk(self) -> Path:
        """A directory that exists, on the disk that the output goes to."""
        if self.inside:
            return self.out
        return next(path for path in self.out.absolute().parents if path.exists())

    @property
    def content(self) -> list[Path]:
        """What the output directory holds, what makes a checkpoint of it last."""
        return _in_order(self.out) if self.out.is_dir() else []

    def refuse_unfit(self, overwrite: bool) -> None:
        """Raise CheckpointError for an output that could not be put here at the end."""
        for path in (self.out, self.partial):
            if path.is_symlink():
                raise CheckpointError(f"'{path}' is a symbolic link; give what it leads to")
            if path.exists() and not path.is_dir():
                raise CheckpointError(f"output '{path}' exists and is not a directory")
        marked = any((self.partial / name).exists() for name in ("lock", *MARKS))
        if self.partial.is_dir() and any(self.partial.iterdir()) and not marked:
            raise CheckpointError(
                f"'{self.partial}', where the work would go, holds something else; move it away, "
                "or give another output"
            )
        for directory in (self.disk, self.out, self.partial):
            if directory.exists() and not os.access(directory, os.W_OK):
                raise CheckpointError(f"no permission to write to '{directory}'")
        if self.content and overwrite:
            real = self.out.resolve()
            if _holds_us(real):
                raise CheckpointError(
                    f"output '{self.out}' is not empty and is or holds the current directory, which"
                    " --overwrite does not replace; give another output"
                )
            for mount in mount_points():
                if mount != real and mount.is_relative_to(real):
                    raise CheckpointError(
                        f"'{mount}' is mounted in output '{self.out}', and --overwrite would "
                        "remove what it holds; give another output"
                    )

    def refuse_sources(self, sources: Iterable[Path]) -> None:
        """Raise CheckpointError where placing would remove what the model is read from."""
        for source in sources:
            if self.inside and _is_or_holds(self.beside("smoothq"), source):
                continue  # an earlier step's work, which is no content
            for directory in (self.out, self.partial):
                if _is_or_holds(directory, source):
                    how = "is" if _is_same(directory, source) else "holds"
                    raise CheckpointError(
                        f"output '{directory}' {how} the model itself ('{source}'); give another "
                        "output"
                    )

    def put(self) -> None:
        """Make what was assembled in `final` the output, and remove all else."""
        self._placing.touch()
        sync(self.partial)
        if not self.out.exists():
            os.replace(self.final, self.out)
            sync(self.out.parent)
        else:
            try:
                self._fill()
            except OSError:
                self.undo()
                raise
        self.remove()

    def _fill(self) -> None:
        self._replaced.mkdir(exist_ok=True)
        for path in reversed(self.content):
            os.replace(path, self._replaced / path.name)
        sync(self._replaced)
        os.replace(self._placing, self._filling)
        sync(self.partial)
        for path in _in_order(self.final):
            os.replace(path, self.out / path.name)
        sync(self.out)
        self.final.rmdir()

    @property
    def was_stopped(self) -> bool:
        """Whether a placing was begun, and neither ended nor undone."""
        return self._placing.exists() or self._filling.exists()

    def undo(self) -> None:
        """Take back a placing that was stopped; of one that had ended, remove what is left."""
        if not self.final.is_dir():
            self.remove()
            return
        if self._filling.exists():
            for path in reversed(self.content):
                os.replace(path, self.final / path.name)
            os.replace(self._filling, self._placing)
        if self._replaced.is_dir():
            for path in _in_order(self._replaced):
                os.replace(path, self.out / path.name)
            self._replaced.rmdir()
        self._placing.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory of the work, the marks last: they say what is left of it."""
        if self.partial.is_dir():
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in MARKS:
                    path.unlink()
            shutil.rmtree(self.partial)


def mount_points() -> set[Path]:
    """Where file systems are mounted, as far as the system says."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    # The fifth field, in which space, tab, newline and backslash are written in octal.
    fields = (line.split(" ")[4] for line in lines)
    return {
        Path(re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), field))
        for field in fields
    }


def is_mounted(path: Path) -> bool:
    """Whether a file or directory is a mount point, which cannot be renamed."""
    return os.path.ismount(path) or path.resolve() in mount_points()


def _can_have_siblings(out: Path) -> bool:
    """Whether a directory can be renamed, and others be made beside it on its file system."""
    parent = out.absolute().parent
    return not (is_mounted(out) or _holds_us(out)) and os.access(parent, os.W_OK)


def _holds_us(directory: Path) -> bool:
    """Whether a directory is the current one or holds it."""
    try:
        return _is_or_holds(directory, Path.cwd())
    except FileNotFoundError:  # it was removed
        return False


def _is_or_holds(directory: Path, path: Path) -> bool:
    """Whether a path, with links followed, is a directory or lies in it."""
    real = path.resolve()
    return any(_is_same(directory, parent) for parent in (real, *real.parents))


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, by whatever names."""
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _in_order(directory: Path) -> list[Path]:
    """The content of a directory, what makes a checkpoint of it last."""
    paths = [path for path in sorted(directory.iterdir()) if path.name not in _NO_CONTENT]
    return sorted(paths, key=lambda path: LAST.index(path.name) + 1 if path.name in LAST else 0)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
