"""A float model in memory, read tensor by tensor and never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..compat import is_custom_class, tied_weights
from ..data.tokenizer import Processor, text_part
from ..errors import CalibrationError, CheckpointError, UnsupportedModelError, first_line
from .in_memory import module_types, storage_bytes, tensors_of
from .model_class import class_of_model
from .side_files import SideFiles
from .skeleton import untie
from .source import Reader, Source
from .weight_files import Spec, digest_tensors


class ModuleSource(Source):
    """A model in memory, which is read and never changed."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Processor | None,
        name: str,
        paths: Iterable[Path] = (),
        files: Mapping[str, Path] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take a model as it is; no tensor is copied.

        Args:
            model: on any device, or offloaded by accelerate.
            tokenizer: of the model, if there is one.
            name: of the model, for messages.
            paths: directories and files that the model was read from.
            files: side files to copy: name in the output → path.
            dtype: that floats are stored in; None keeps each tensor's dtype.

        Raises:
            CheckpointError: for a config that cannot be written as JSON.
            UnsupportedModelError: for a tensor on the meta device that is not offloaded.
        """
        self.name, self.config = name, model.config
        self._class = class_of_model(model)
        self.trusts_code = is_custom_class(self._class)
        try:
            model.config.to_json_string()
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{name}: its config cannot be written as JSON: {first_line(error)}"
            ) from error
        self._paths, self._dtype = list(paths), dtype
        self._types = module_types(model)
        generation_config = getattr(model, "generation_config", None)
        self._side_files = SideFiles(dict(files or {}), (), tokenizer, generation_config)
        self._tensors = tensors_of(model)
        self.nbytes = storage_bytes(self._tensors)

    @property
    def paths(self) -> list[Path]:
        """The directories and files that the model was read from."""
        return self._paths

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The model's class, or the one that its config stands for where transformers lacks it."""
        return self._class

    def match(self, model: PreTrainedModel) -> Reader:
        """Match the tensors with those of a model of the same class, by equal names.

        Raises:
            UnsupportedModelError: if a module or tensor of the model in memory is not one that its
                class builds.
        """
        for name, kind in module_types(model).items():
            if self._types.get(name, kind) is not kind:
                raise UnsupportedModelError(
                    f"{self.name}: '{name}' is a {self._types[name].__name__}, its class has a "
                    f"{kind.__name__} there: save the model under a class that has it"
                )
        tensors = self._tensors
        for target, twin in list(tied_weights(model).items()):
            if target in tensors and twin in tensors:
                left, right = tensors[target], tensors[twin]
                if left.data_ptr() != right.data_ptr() and not torch.equal(left, right):
                    untie(model, target)
        tied, wanted, modules = tied_weights(model), model.state_dict(), module_types(model)
        specs: dict[str, Spec] = {}
        unnamed: dict[str, tuple[str, Spec]] = {}
        for name, tensor in tensors.items():
            dtype = self._dtype if tensor.is_floating_point() else None
            spec = Spec(tuple(tensor.shape), dtype or tensor.dtype)
            if name in wanted and name not in tied:
                specs[name] = spec
            elif name not in wanted and name.rpartition(".")[0] not in modules:
                unnamed[name] = name, spec
            elif name not in wanted:
                raise UnsupportedModelError(
                    f"{self.name}: its class has no tensor '{name}', so the model in memory is "
                    "another than it makes: save the model under a class that has it"
                )
        return _Tensors(tensors, specs, unnamed, self.name)

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""
        digest = hashlib.sha256(self.config.to_json_string().encode())
        digest_tensors(digest, self._tensors)
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was given with the model, or None; a processor's own."""
        given = self._side_files.tokenizer
        return None if given is None else text_part(given)

    def processor(self) -> ProcessorMixin:
        """The processor that was given with the model."""
        given = self._side_files.tokenizer
        if not isinstance(given, ProcessorMixin):
            raise CalibrationError(
                f"{self.name} is a model in memory: pass its processor as tokenizer for rows with "
                "images"
            )
        return given

    def side_files(self) -> SideFiles:
        """The tokenizer, the generation config and the given files."""
        return self._side_files


@dataclass
class _Tensors:
    """The tensors of a model in memory, as a `Reader`. source: name of the model, for messages."""

    stored: Mapping[str, Tensor]
    specs: dict[str, Spec]
    unnamed: dict[str, tuple[str, Spec]]
    source: str

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in their present dtypes, sharing memory with the model."""
        for name in names:
            if name not in self.stored:
                raise CheckpointError(f"{self.source}: the model has no tensor '{name}'")
            yield name, self.stored[name].detach()

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in chunks of `count` rows, sharing memory with the model."""
        ((_, tensor),) = self.tensors([name])
        yield from tensor.split(count)
