"""`manifest.json`: what a finished checkpoint consists of, by hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError
from .tensor_file import COPY_BYTES, Entry

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """The hash of every tensor's bytes, as in `Entry`, by dtype and name, and of other files."""

    tensors: dict[str, dict[str, str]]
    files: dict[str, str]

    @classmethod
    def of(cls, tensors: dict[str, Entry], files: list[Path]) -> Manifest:
        """What a checkpoint of these tensors and other files consists of."""
        by_dtype: dict[str, dict[str, str]] = {}
        for name, entry in tensors.items():
            by_dtype.setdefault(entry.dtype, {})[name] = entry.sha256
        return cls(tensors=by_dtype, files={path.name: sha256_of(path) for path in files})

    def write(self, directory: Path) -> None:
        """Put it into a checkpoint."""
        (directory / MANIFEST).write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """A checkpoint's. Raises CheckpointError where there is none, or it cannot be read."""
        path = directory / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{directory} has no {MANIFEST}: smoothq quantize writes one")
        try:
            return cls.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
