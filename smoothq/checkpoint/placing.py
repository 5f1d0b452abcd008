"""Where an output directory and its work directory are, and moving the finished output into place.

The work directory is `OUT.partial`; where `OUT` cannot have a sibling on its file system, it is
`OUT/.partial`. If `OUT` does not exist, placing is one rename of `OUT.partial/final` to `OUT`. An
existing directory is filled instead of replaced, because it may be a mount point or a current
directory: its content moves to `OUT.partial/replaced`, `config.json` first, and the new content
moves in, manifest and `config.json` last. So a directory with a `config.json` is always complete.

Two marker files in the work directory record how far placing is: `placing` is created when it
begins, and renamed to `filling` when the old content has moved out. An interrupted placing is
undone before anything else happens.
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
LAST = (MANIFEST, "config.json")  # moved in last, and moved out first
# Names in a directory that do not count as its content. File systems have lost+found at the root.
_NO_CONTENT = frozenset({".partial", ".smoothq", ".smoothq.partial", "lost+found"})


class Place:
    """An output directory and its work directory.

    Attributes:
        out: the output directory.
        inside: whether the work directory lies in `out` instead of beside it.
        partial: the work directory.
        final: the directory in `partial` in which the output is assembled.
    """

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
        """The path for a work directory on the output's file system: `OUT.name` or `OUT/.name`."""
        return (
            self.out / f".{name}" if self.inside else self.out.with_name(f"{self.out.name}.{name}")
        )

    @property
    def disk(self) -> Path:
        """An existing directory on the disk that the output goes to."""
        if self.inside:
            return self.out
        return next(path for path in self.out.absolute().parents if path.exists())

    @property
    def content(self) -> list[Path]:
        """The paths in the output directory, manifest and config last; empty if there is none."""
        return _in_order(self.out) if self.out.is_dir() else []

    def refuse_unfit(self, overwrite: bool) -> None:
        """Refuse an output that could not be placed at the end of a run.

        Args:
            overwrite: whether the output's present content will be replaced.

        Raises:
            CheckpointError: for symbolic links, files, foreign content of the work directory, no
                permission to write, and content that `overwrite` does not replace: a current
                directory or a mount point below the output.
        """
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
            self._refuse_irreplaceable()

    def _refuse_irreplaceable(self) -> None:
        """Raise CheckpointError for an output with the current directory or a mount point in it."""
        real = self.out.resolve()
        if _holds_us(real):
            raise CheckpointError(
                f"output '{self.out}' is not empty and is or holds the current directory, which"
                " overwrite=True does not replace; give another output"
            )
        for mount in mount_points():
            if mount != real and mount.is_relative_to(real):
                raise CheckpointError(
                    f"'{mount}' is mounted in output '{self.out}', and overwrite=True would "
                    "remove what it holds; give another output"
                )

    def refuse_sources(self, sources: Iterable[Path]) -> None:
        """Raise CheckpointError if placing would remove a path that the model is read from."""
        for source in sources:
            if self.inside and _is_or_holds(self.beside("smoothq"), source):
                continue  # the work directory of an earlier step, which placing leaves alone
            for directory in (self.out, self.partial):
                if _is_or_holds(directory, source):
                    how = "is" if _is_same(directory, source) else "holds"
                    raise CheckpointError(
                        f"output '{directory}' {how} the model itself ('{source}'); give another "
                        "output"
                    )

    def put(self) -> None:
        """Make `final` the output, and remove the work directory and the old content.

        Raises:
            OSError: if the disk refuses; then the old content is back in place.
        """
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
        """Whether a marker shows that a placing began and was neither finished nor undone."""
        return self._placing.exists() or self._filling.exists()

    def undo(self) -> None:
        """Undo an interrupted placing; if all was in place, only remove the work directory.

        Without `final` the output is complete: `final` is renamed or removed as the last step.
        """
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
        """Remove the work directory, the marker files last, so that a removal can be resumed."""
        if self.partial.is_dir():
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in MARKS:
                    path.unlink()
            shutil.rmtree(self.partial)


def mount_points() -> set[Path]:
    """The mount points that /proc/self/mountinfo lists; empty where there is no such file."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    # The fifth field is the mount point; space, tab, newline and backslash are octal escapes in it.
    fields = (line.split(" ")[4] for line in lines)
    return {
        Path(re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), field))
        for field in fields
    }


def is_mounted(path: Path) -> bool:
    """Whether a file or directory is a mount point, which cannot be renamed."""
    return os.path.ismount(path) or path.resolve() in mount_points()


def _can_have_siblings(out: Path) -> bool:
    """Whether `out` can be renamed, and directories be created beside it on its file system."""
    parent = out.absolute().parent
    return not (is_mounted(out) or _holds_us(out)) and os.access(parent, os.W_OK)


def _holds_us(directory: Path) -> bool:
    """Whether a directory is the current one or holds it."""
    try:
        return _is_or_holds(directory, Path.cwd())
    except FileNotFoundError:  # it was removed
        return False


def _is_or_holds(directory: Path, path: Path) -> bool:
    """Whether a path, with links followed, is `directory` or lies below it."""
    real = path.resolve()
    return any(_is_same(directory, parent) for parent in (real, *real.parents))


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or directory."""
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _in_order(directory: Path) -> list[Path]:
    """The content of a directory, sorted, with manifest and config last."""
    paths = [path for path in sorted(directory.iterdir()) if path.name not in _NO_CONTENT]
    return sorted(paths, key=lambda path: LAST.index(path.name) + 1 if path.name in LAST else 0)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
