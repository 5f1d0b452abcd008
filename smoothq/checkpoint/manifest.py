"""`manifest.json`: what a finished checkpoint consists of, by hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError
from .tensor_file import COPY_BYTES

MANIFEST = "manifest.json"


class StoredTensor(BaseModel, frozen=True):
    """A tensor's dtype, shape, and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Manifest(BaseModel):
    """The tensors by name, and the SHA-256 of every other file."""

    tensors: dict[str, StoredTensor]
    files: dict[str, str]

    def write(self, directory: Path) -> None:
        """Put it into a checkpoint."""
        (directory / MANIFEST).write_text(self.model_dump_json(indent=1), encoding="utf-8")

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
