"""`manifest.json`: the hashes of a finished checkpoint's tensors and files, and its run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..errors import CheckpointError, first_line
from .tensor_file import COPY_BYTES, Entry

MANIFEST = "manifest.json"
COMPRESSED_TENSORS = "compressed-tensors"  # value of RunKey.form for such an export


class RunKey(BaseModel, frozen=True):
    """What determines the bytes of a run's output; work with another key is not resumed.

    Attributes:
        version: of smoothq.
        recipe: hash of the recipe.
        model: hash of the float model.
        calibration: hash of the calibration tokens.
        form: format of the output: `smoothq`, or that of an export.
    """

    version: str
    recipe: str
    model: str
    calibration: str
    form: str = "smoothq"


class Manifest(BaseModel):
    """The content of `manifest.json`.

    Attributes:
        tensors: dtype → tensor name → hash of the tensor's bytes, as in `Entry.sha256`.
        files: name relative to the checkpoint, with `/` → SHA-256; all files but the weights.
        run: of the run that wrote the checkpoint; None in manifests of earlier versions.
    """

    tensors: dict[str, dict[str, str]]
    files: dict[str, str]
    run: RunKey | None = None

    @classmethod
    def of(cls, directory: Path, tensors: dict[str, Entry], run: RunKey) -> Manifest:
        """The manifest of a checkpoint.

        Args:
            directory: with all files but the manifest.
            tensors: the stored tensors by name.
            run: that wrote the checkpoint.
        """
        by_dtype: dict[str, dict[str, str]] = {}
        for name, entry in tensors.items():
            by_dtype.setdefault(entry.dtype, {})[name] = entry.sha256
        return cls(tensors=by_dtype, files=hashes_of(directory), run=run)

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into a checkpoint's directory."""
        (directory / MANIFEST).write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointError: if there is none, or it cannot be read.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{directory} has no {MANIFEST}: smoothq quantize writes one")
        try:
            return cls.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def hashes_of(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory tree but `*.safetensors`, by relative name with `/`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    others = [path for path in paths if path.suffix != ".safetensors"]
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in others}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
