"""`manifest.json`: what a finished checkpoint consists of, by hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError, first_line
from .tensor_file import COPY_BYTES, Entry

MANIFEST = "manifest.json"
COMPRESSED_TENSORS = "compressed-tensors"  # the form of an export


class RunKey(BaseModel, frozen=True):
    """What a run's bytes follow from: to go on with the work of another is refused.

    form: of the output, our own or an export's.
    """

    version: str
    recipe: str
    model: str
    calibration: str
    form: str = "smoothq"


class Manifest(BaseModel):
    """The hash of every tensor's bytes, as in `Entry`, by dtype and name, and of other files.

    files: by name, with `/` before what lies in a directory. run: what made the checkpoint;
    manifests of earlier versions do not say.
    """

    tensors: dict[str, dict[str, str]]
    files: dict[str, str]
    run: RunKey | None = None

    @classmethod
    def of(cls, directory: Path, tensors: dict[str, Entry], run: RunKey) -> Manifest:
        """What a checkpoint of these tensors in a directory consists of."""
        by_dtype: dict[str, dict[str, str]] = {}
        for name, entry in tensors.items():
            by_dtype.setdefault(entry.dtype, {})[name] = entry.sha256
        return cls(tensors=by_dtype, files=hashes_of(directory), run=run)

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


def hashes_of(directory: Path) -> dict[str, str]:
    """Of every file in a directory and below that is not weights, by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    others = [path for path in paths if path.suffix != ".safetensors"]
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in others}


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
