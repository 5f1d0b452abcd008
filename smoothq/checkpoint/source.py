"""A float model that is read tensor by tensor, for a pass that holds one block at a time.

A source gives the model's skeleton, with parameters on the meta device, and single tensors by the
names that the skeleton has for them. `checkpoint_source` reads a directory, `module_source` a model
in memory; `open` chooses.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..architectures.graph import all_finite
from ..compat import tied_weights
from ..errors import CalibrationError, CheckpointError, NumericsError, UnsupportedModelError
from ..runtime.mapped import mapped_tensor, touch
from ..runtime.memory import give_back
from .side_files import SideFiles
from .skeleton import skeleton_of, take_dtypes
from .weight_files import Spec, families_of

STACK_BYTES = 16 << 20  # of a stack of matrices that is read one by one, in the source
PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Reader(Protocol):
    """A source's tensors, matched with the names of a model.

    Attributes:
        specs: shape and dtype of what the model has, by its names; a tied parameter is not listed.
        unnamed: stored name of what it does not have → the name that it would have, and its spec.
    """

    specs: dict[str, Spec]
    unnamed: dict[str, tuple[str, Spec]]

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As `Source.tensors`."""

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """As `Source.rows`."""


class _Matched(NamedTuple):
    """What matching a source's tensors with its model comes to; see the properties of `Source`."""

    model: PreTrainedModel
    reader: Reader
    extras: dict[str, Spec]
    notes: list[str]


class Source(ABC):
    """A float causal LM that can be read tensor by tensor.

    Its tensors are matched with those of the model's class once, when first something depends on
    it.

    Attributes:
        name: of the model, for messages.
        config: of the model.
        nbytes: bytes of all tensors.
        trusts_code: whether code beside the model is run, as `trust_remote_code=True` asks.
    """

    name: str
    config: PretrainedConfig
    nbytes: int
    trusts_code: bool = False

    @property
    @abstractmethod
    def paths(self) -> list[Path]:
        """The directories and files that the model is read from."""

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class of the model; None for the one that the config stands for."""
        return None

    @abstractmethod
    def match(self, model: PreTrainedModel) -> Reader:
        """Match the stored tensors with a skeleton's, in which twins that differ are untied."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, if it has one."""

    @abstractmethod
    def processor(self) -> ProcessorMixin:
        """The model's processor of images or sound and text.

        Raises:
            CalibrationError: if it has none, or it cannot be loaded here.
        """

    @abstractmethod
    def side_files(self) -> SideFiles:
        """The files to copy into an output beside the weights.

        Raises:
            CheckpointError: for a file that cannot be read.
        """

    @cached_property
    def _matched(self) -> _Matched:
        model = skeleton_of(self.config, self.name, self.model_class)
        reader = self.match(model)
        take_dtypes(model, {name: spec.dtype for name, spec in reader.specs.items()})
        modules = {name for name, _ in model.named_modules()}
        extras, useless = {}, []
        for stored, (name, spec) in reader.unnamed.items():
            if {stored.rpartition(".")[0], name.rpartition(".")[0]} & modules:
                useless.append(stored)
            else:
                extras[stored] = spec
        kept = "tensors that the model's class does not know are kept as they are"
        left_out = "stored tensors are left out, for the model's code does not use them"
        notes = [
            f"{len(names)} {what}: {families_of(names)}"
            for names, what in ((extras, kept), (useless, left_out))
            if names
        ]
        buffers = {name for name, _ in model.named_buffers()}
        notes += [
            f"{name} is not stored: it is as the model's class makes it"
            for name in model.state_dict()
            if name in buffers and name not in reader.specs
        ]
        return _Matched(model, reader, extras, notes)

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of the stored parameters and persistent buffers, by the model's names."""
        return self._matched.reader.specs

    @property
    def extras(self) -> dict[str, Spec]:
        """The same of tensors of modules that the model's class lacks, by their stored names.

        They are copied into the output unchanged.
        """
        return self._matched.extras

    @property
    def notes(self) -> list[str]:
        """Remarks for the user, such as tensors that are left out."""
        return self._matched.notes

    def skeleton(self, check: bool = True) -> PreTrainedModel:
        """The model with parameters on the meta device and real buffers; a copy to change.

        Its floats have the stored dtypes, and parameters are tied where the stored values agree.

        Args:
            check: whether to compare the stored tensors with the model's.

        Raises:
            CheckpointError: for a tensor that is missing or has another shape.
            UnsupportedModelError: for a config that fits no model, or a float stored in a dtype
                that needs scales, such as float8.
        """
        model, specs = self._matched.model, self.specs
        optional = {name for name, _ in model.named_buffers()} | set(tied_weights(model))
        for name, tensor in model.state_dict().items() if check else ():
            if name in specs:
                _check_spec(specs[name], name, tensor, self.name)
            elif name not in optional:
                raise CheckpointError(f"{self.name}: the checkpoint has no tensor '{name}'")
        return copy.deepcopy(model)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of tensors in their stored dtypes, one by one, in any order.

        Args:
            names: of the model's tensors, or of `extras`. A tied parameter is read as the one that
                it is tied to.

        Raises:
            CheckpointError: for a tensor that is not stored.
        """
        ties, specs = tied_weights(self._matched.model), self.specs
        wanted: dict[str, list[str]] = {}
        for name in names:
            stored = ties[name] if name not in specs and name in ties else name
            wanted.setdefault(stored, []).append(name)
        for stored, tensor in self._matched.reader.tensors(wanted):
            yield from ((name, tensor) for name in wanted[stored])

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in chunks of `count` rows, of which one at a time is in memory.

        Args:
            name: of the parameter in the model.
            count: rows of a chunk; the last may be shorter.
        """
        return self._matched.reader.rows(name, count)


def _check_spec(spec: Spec, name: str, wanted: Tensor, model: str) -> None:
    """Raise CheckpointError for a wrong shape, UnsupportedModelError for a wrong dtype."""
    if spec.shape != wanted.shape:
        raise CheckpointError(
            f"{model}: tensor '{name}' has shape {spec.shape}, the config asks for "
            f"{tuple(wanted.shape)}"
        )
    if wanted.is_floating_point() and spec.dtype not in PLAIN_FLOATS:
        raise UnsupportedModelError(
            f"{model}: tensor '{name}' is stored as {spec.dtype}, and nothing beside it says what "
            "its numbers stand for; quantize the float model"
        )


def text_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """A source's tokenizer, for text. Raises CalibrationError where the source has none."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise CalibrationError(f"{source.name} has no tokenizer to read text with")
    return tokenizer


def load_module(
    module: nn.Module,
    prefix: str,
    source: Source,
    dtype: torch.dtype | None,
    directory: Path | None = None,
) -> None:
    """Fill a module's parameters and persistent buffers from a source, with copies.

    A buffer that is not stored keeps the values that the model's class computed.

    Args:
        module: of the source's skeleton.
        prefix: full name of the module; empty for the model.
        source: of the weights.
        dtype: of the floats; None keeps the stored dtypes.
        directory: for files of large stacks of matrices, as of experts, which are read one by one
            and mapped; None has all in memory.

    Raises:
        CheckpointError: for a missing tensor or a wrong shape.
        NumericsError: for NaN or Inf.
    """
    expected = module.state_dict()
    start = f"{prefix}." if prefix else ""
    unstored = {n for n, _ in module.named_buffers() if f"{start}{n}" not in source.specs}
    names = {f"{start}{name}": name for name in expected if name not in unstored}
    loaded = {}
    if directory is not None and dtype is not None:
        for full in [full for full in names if is_large_stack(source.specs.get(full))]:
            loaded[names.pop(full)] = _mapped_stack(source, full, dtype, directory)
    for full, tensor in source.tensors(names):
        check_weight(tensor, full, tuple(expected[names[full]].shape), source.name)
        # A copy, never a view: transforms write in place.
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        loaded[names[full]] = tensor.to(wanted, copy=True)
    module.load_state_dict(loaded, strict=False, assign=True)
    module.requires_grad_(False)


def is_large_stack(spec: Spec | None) -> bool:
    """Whether a tensor is a stack of matrices that takes much memory, as of experts.

    Args:
        spec: of the stored tensor; None for one that is not stored.
    """
    if spec is None or len(spec.shape) != 3 or not spec.dtype.is_floating_point:
        return False
    return spec.nbytes >= STACK_BYTES


def _mapped_stack(source: Source, full: str, dtype: torch.dtype, directory: Path) -> Tensor:
    """A stack of matrices in a file, read one by one."""
    shape = source.specs[full].shape
    stack, first = mapped_tensor(shape, dtype, directory), 0
    for rows in source.rows(full, 1):
        check_weight(rows, full, (len(rows), *shape[1:]), source.name)
        part = stack[first : first + len(rows)]
        touch(part)
        part.copy_(rows)
        first += len(rows)
    return stack


def check_weight(tensor: Tensor, name: str, shape: tuple[int, ...], model: str) -> None:
    """Check a weight that was read.

    Args:
        tensor: as read.
        name: of the tensor, for messages.
        shape: that the model's config asks for.
        model: name of the model, for messages.

    Raises:
        CheckpointError: for another shape.
        NumericsError: for NaN or Inf.
    """
    if tensor.shape != shape:
        raise CheckpointError(
            f"{model}: tensor '{name}' has shape {tuple(tensor.shape)}, the config asks for {shape}"
        )
    if not all_finite(tensor):
        raise NumericsError(f"{model}: tensor '{name}' holds NaN or Inf")


def unload_module(module: nn.Module) -> None:
    """Move a module to the meta device, and return its memory to the system."""
    module.to("meta")
    give_back()
