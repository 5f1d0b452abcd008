"""A model as it is stored: tensors, config and files beside them, read without its class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.by_name import stays_float
from ..checkpoint.hub_files import resolve_directory
from ..checkpoint.model_config import already_quantized
from ..checkpoint.side_files import CONFIG, SideFiles
from ..checkpoint.weight_files import (
    Spec,
    digest_file,
    read_rows,
    read_tensor,
    tensor_files,
    tensor_shapes,
)
from ..errors import CheckpointError, first_line

COPIED_BYTES = 64 << 20  # of a tensor that are copied at a time, unless a row has more
NARROW = 32  # a matrix with fewer rows or columns is a gate or a factor, and stays in float
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Ends of the names of tensors that only quantized models have.
OF_QUANTIZED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".qzeros")


@dataclass(frozen=True)
class StoredModel:
    """A directory of weights with `config.json`.

    Attributes:
        name: of the model, for messages.
        directory: of the model.
        config: the content of `config.json`.
        files: tensor name → the file that holds it.
        specs: tensor name → shape and dtype.
        side_files: that go along.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    files: dict[str, Path]
    specs: dict[str, Spec]
    side_files: SideFiles

    @classmethod
    def open(cls, model: str) -> StoredModel:
        """Read config and headers; no weights.

        Args:
            model: a directory or a hub id.

        Raises:
            CheckpointError: for files that are missing or cannot be read.
            UnsupportedModelError: for a model that is quantized already.
        """
        directory = resolve_directory(model)
        config = _config_of(directory, model)
        files = tensor_files(directory, model)
        for tensor in files:
            if tensor.endswith(OF_QUANTIZED):
                raise already_quantized(model, f"it has a tensor {tensor}")
        of_files = {path: tensor_shapes(path) for path in sorted(set(files.values()))}
        specs = {tensor: of_files[path][tensor] for tensor, path in files.items()}
        for tensor, spec in specs.items():
            if tensor.endswith(".weight") and spec.dtype.itemsize == 1:
                raise already_quantized(model, f"{tensor} has dtype {spec.dtype}")
        return cls(model, directory, config, files, specs, SideFiles.of(directory))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def paths_of_weights(self) -> list[Path]:
        """The files of weights, in order."""
        return sorted(set(self.files.values()))

    @property
    def paths(self) -> list[Path]:
        """The directory and its weight and side files, which may be symbolic links."""
        return [self.directory, *self.paths_of_weights, *self.side_files.files.values()]

    def names_in(self, path: Path) -> list[str]:
        """The tensors that are read from a file."""
        return [tensor for tensor, file in self.files.items() if file == path]

    @cached_property
    def matrices(self) -> dict[str, Spec]:
        """The float matrices called `.weight`, by the full names of their modules."""
        return {
            tensor.removesuffix(".weight"): spec
            for tensor, spec in self.specs.items()
            if tensor.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in FLOATS
        }

    @cached_property
    def linears(self) -> dict[str, Spec]:
        """Those of `matrices` that are linears of blocks, by name and shape.

        A matrix with a row for each token of the vocabulary is none.
        """
        vocabularies = set(_vocabularies(self.config))
        return {
            name: spec
            for name, spec in self.matrices.items()
            if not stays_float(name)
            and min(spec.shape) >= NARROW
            and spec.shape[0] not in vocabularies
        }

    @cached_property
    def stacks(self) -> list[str]:
        """Names of tensors that are stacks of experts' matrices."""
        return [
            tensor
            for tensor, spec in self.specs.items()
            if len(spec.shape) == 3 and spec.dtype in FLOATS and "expert" in tensor
        ]

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in self.paths_of_weights:
            digest_file(digest, path)
        return digest.hexdigest()

    def rows(self, tensor: str, count: int | None = None) -> Iterator[Tensor]:
        """A tensor in chunks of rows, without keeping one in memory.

        Args:
            tensor: its name.
            count: rows of a chunk; None for as many as are copied at a time.
        """
        path, spec = self.files[tensor], self.specs[tensor]
        if not spec.shape or not spec.elements:
            yield read_tensor(path, tensor)
            return
        of_row = spec.nbytes // spec.shape[0]
        yield from read_rows(path, tensor, count or max(1, COPIED_BYTES // of_row))


def _config_of(directory: Path, name: str) -> dict[str, Any]:
    """The content of `config.json`, without the name of a weights file."""
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{name}: no {CONFIG} in {directory}; is it a model directory?")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} cannot be read: it is no mapping of fields")
    for part in _parts(config):
        for field in ("quantization_config", "compression_config"):
            quantization = part.get(field)
            if quantization:
                method = quantization.get("quant_method", "?")
                raise already_quantized(name, f"quant_method '{method}'")
    config.pop("transformers_weights", None)
    return config


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and the configs in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _vocabularies(config: Mapping[str, Any]) -> Iterator[int]:
    for part in _parts(config):
        if isinstance(part.get("vocab_size"), int):
            yield part["vocab_size"]
