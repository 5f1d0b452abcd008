"""A float model in a checkpoint directory, read tensor by tensor."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..compat import WeightConversions, loading_order, run_converter, tied_weights
from ..data.tokenizer import load_processor, load_tokenizer
from ..errors import CheckpointError, first_line
from .formats.choose import as_float
from .formats.decoded import DecodedTensors
from .formats.format import Format
from .model_config import check_sizes, config_in
from .side_files import CONFIG, GENERATION_CONFIG, SideFiles, has_tokenizer
from .skeleton import untie
from .source import Reader, Source
from .stored import StoredTensors, WeightFiles
from .weight_files import Spec, digest_file, tensor_files

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
COMPARED_ROWS = 4096  # read at a time when two tensors are compared


class CheckpointSource(Source):
    """A directory with `config.json` and weights (safetensors or `.bin`), read tensor by tensor.

    Attributes:
        directory: of the checkpoint.
        files: stored tensor name → the file that holds it.
        format: in which weights are decoded while they are read; None reads them as stored.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        trust_remote_code: bool = False,
        decodes: bool = False,
    ) -> None:
        """Read the config and the tensors' names; no weights.

        Args:
            directory: of the checkpoint.
            name: of the model, for messages.
            trust_remote_code: whether to run code beside the model.
            decodes: whether a model that is quantized already is read as a float model.

        Raises:
            CheckpointError: for files that are missing or cannot be read.
            UnsupportedModelError: for a config that fits no model, or says that the model is
                quantized in a way that is not decoded.
        """
        self.name, self.directory = name, directory
        self.trusts_code = trust_remote_code
        self.config = config_in(directory, name, trust_remote_code)
        self._stored_config = self.config.to_json_string()
        self.format: Format | None = None
        if decodes:
            self.config, self.format = as_float(self.config, name)
        self.files = tensor_files(directory, name)
        check_sizes(self.config, self.files, name)
        self.nbytes = sum(path.stat().st_size for path in set(self.files.values()))
        if (directory / GENERATION_CONFIG).is_file():
            try:
                GenerationConfig.from_pretrained(directory)
            except Exception as error:  # transformers has no common base for damaged files
                raise CheckpointError(
                    f"{name}: {GENERATION_CONFIG} cannot be read: {first_line(error)}"
                ) from error

    @property
    def paths(self) -> list[Path]:
        """The directory and its weight and side files, which may be symbolic links."""
        return [self.directory, *set(self.files.values()), *self.side_files().files.values()]

    def match(self, model: PreTrainedModel) -> Reader:
        """Match the stored tensors with a model's by transformers' renamings and conversions."""
        files = WeightFiles(self.files)
        stored: StoredTensors = files
        if self.format is not None:
            stored = DecodedTensors(files, self.format, self.name)
        return _NamedTensors(stored, model, self.name)

    @property
    def notes(self) -> list[str]:
        """Remarks for the user; the first says how quantized weights are read."""
        return [*([] if self.format is None else [self.format.note]), *super().notes]

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""
        digest = hashlib.sha256(self._stored_config.encode())
        for path in sorted(set(self.files.values())):
            digest_file(digest, path)
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the weights, if there is one."""
        if not has_tokenizer(self.directory):
            return None
        return load_tokenizer(self.directory, self.name, trust_remote_code=self.trusts_code)

    def processor(self) -> ProcessorMixin:
        """The processor beside the weights."""
        return load_processor(self.directory, self.name, self.trusts_code)

    def side_files(self) -> SideFiles:
        """The directory's side files, with generation parameters of an older config.json."""
        side_files = SideFiles.of(self.directory)
        if GENERATION_CONFIG in side_files.files:
            return side_files
        # Older configs hold generation parameters. transformers reads them from config.json, but
        # does not keep them in a config that it loads and writes again.
        stored_config = GenerationConfig.from_model_config(
            json.loads((self.directory / CONFIG).read_bytes())
        )
        loaded_config = GenerationConfig.from_model_config(copy.deepcopy(self.config))
        return (
            side_files
            if stored_config == loaded_config
            else replace(side_files, generation_config=stored_config)
        )


@dataclass(frozen=True)
class _Conversion:
    """One of transformers' conversions between stored tensors and parameters, as for experts.

    name: of its first parameter. parts: (source pattern, stored name) of its inputs.
    """

    name: str
    converter: Any
    parts: list[tuple[str, str]]

    def by_number(self) -> list[_Conversion]:
        """One for each number that tells the inputs' names apart, in order; itself without one."""
        numbers = [_NUMBER.findall(stored) for _, stored in self.parts]
        if len({len(members) for members in numbers}) > 1:
            return [self]
        columns = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
        if len(columns) != 1:
            return [self]
        groups: dict[int, list[tuple[str, str]]] = {}
        for number, part in zip(columns[0], self.parts, strict=True):
            groups.setdefault(int(number), []).append(part)
        return [replace(self, parts=parts) for _, parts in sorted(groups.items())]


class _NamedTensors:
    """Stored tensors under a model's names, each renamed, converted or as it is."""

    def __init__(self, files: StoredTensors, model: PreTrainedModel, source: str) -> None:
        """files: the tensors by stored name. source: name of the model, for messages."""
        self._files, self._model, self._source = files, model, source
        stored_specs = files.specs
        renamings, wanted = WeightConversions(model), model.state_dict()
        conversions: dict[str, _Conversion] = {}
        self._stored: dict[str, str] = {}
        self.unnamed: dict[str, tuple[str, Spec]] = {}
        for stored in sorted(stored_specs, key=loading_order):
            name, pattern = renamings.rename(stored)
            if name not in wanted and stored in wanted:
                name, pattern = renamings.add_prefix(stored)
            if name not in wanted or (pattern is None and name in self._stored):
                self.unnamed[stored] = name, stored_specs[stored]
            elif pattern is None:
                self._stored[name] = stored
            else:
                conversion = _Conversion(name, renamings.converter(pattern), [])
                conversions.setdefault(name, conversion).parts.append((pattern, stored))
        self.specs = {name: stored_specs[stored] for name, stored in self._stored.items()}
        self._conversions: dict[str, _Conversion] = {}
        for conversion in conversions.values():
            # A converter names its results only by converting: here on the meta device.
            specs = {stored: stored_specs[stored] for _, stored in conversion.parts}
            empty = {
                stored: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                for stored, spec in specs.items()
            }
            for name, tensor in self._convert(conversion, empty).items():
                if name in wanted:
                    self._conversions[name] = conversion
                    self.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        self._settle_ties()

    def _settle_ties(self) -> None:
        """Tie as transformers would: where both twins are stored and differ, untie them."""
        for target, source in list(tied_weights(self._model).items()):
            if target in self._stored and source not in self.specs:
                self.specs[source] = self.specs.pop(target)
                self._stored[source] = self._stored.pop(target)
            elif target in self.specs and not self._same(target, source):
                untie(self._model, target)
            else:
                self.specs.pop(target, None)

    def _same(self, one: str, other: str) -> bool:
        """Whether two stored tensors are equal, compared in chunks of rows."""
        if self.specs[one].shape != self.specs[other].shape:
            return False
        pairs = zip(self.rows(one, COMPARED_ROWS), self.rows(other, COMPARED_ROWS), strict=True)
        return all(torch.equal(left, right) for left, right in pairs)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), mapped from a file or converted; copy a mapped one to keep it.

        A conversion yields all of its tensors that are asked for together.
        """
        left = dict.fromkeys(names)
        stored = {self._key(name): name for name in left if name not in self._conversions}
        while converted := [name for name in left if name in self._conversions]:
            conversion = self._conversions[converted[0]]
            inputs = dict(self._read(part for _, part in conversion.parts))
            parameters = self._convert(conversion, inputs)
            for name in converted:
                if self._conversions[name] is conversion:
                    del left[name]
                    yield name, parameters[name]
        for key, tensor in self._read(stored):
            yield stored[key], tensor

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in chunks of `count` rows.

        Of one that is converted from tensors of each expert, all rows of one are in memory, and of
        any other converted one the whole.
        """
        if name in self._conversions:
            for part in self._parts(self._conversions[name], name):
                tensors = dict(self._read(stored for _, stored in part.parts))
                yield from self._convert(part, tensors)[name].split(count)
        else:
            yield from self._files.rows(self._key(name), count)

    def _key(self, name: str) -> str:
        """The stored name of a tensor that is not converted. Raises CheckpointError without one."""
        if name not in self._stored and name not in self.unnamed:
            raise CheckpointError(f"{self._source}: the checkpoint has no tensor '{name}'")
        return self._stored.get(name, name)

    def _read(self, stored: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(stored name, tensor), file by file."""
        for key in sorted(stored, key=self._files.place):
            # Opened for this tensor only: pages of a mapped file count as resident memory.
            yield key, self._files.tensor(key)

    def _parts(self, conversion: _Conversion, name: str) -> list[_Conversion]:
        """A conversion as one for each expert, whose results `name` in order are its own.

        It has the whole as its only member where the stored tensors are not those of experts.
        """
        parts = conversion.by_number()
        shapes: list[tuple[int, ...]] = []
        for members in (parts[0], conversion):
            empty = {
                stored: torch.empty(self._files.specs[stored].shape, device="meta")
                for _, stored in members.parts
            }
            shapes.append(tuple(self._convert(members, empty)[name].shape))
        (rows, *width), whole = shapes[0], shapes[1]
        return parts if (rows * len(parts), *width) == whole else [conversion]

    def _convert(self, conversion: _Conversion, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply one of transformers' conversions, and return its results by name in the model.

        It merges several stored tensors, or splits one. tensors: inputs by stored name.
        """
        parts = [
            (pattern, stored, partial(tensors.__getitem__, stored))
            for pattern, stored in conversion.parts
        ]
        try:
            return run_converter(conversion.converter, conversion.name, parts, self._model)
        except Exception as error:  # transformers' conversions have no common base
            raise CheckpointError(
                f"{self._source}: '{conversion.name}' cannot be made of the stored tensors: "
                f"{first_line(error)}"
            ) from error
