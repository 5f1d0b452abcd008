"""Sources of float weights: a checkpoint read tensor by tensor, or a model in memory.

Both give single tensors by name for a skeleton, which is the model with parameters on the meta
device; so the pipeline needs memory for one block at a time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..architectures.graph import all_finite
from ..compat import (
    WeightConversions,
    initialize_unmarked,
    loading_order,
    mark_initialized,
    remove_tie,
    run_converter,
    tied_weights,
)
from ..data.tokenizer import load_tokenizer
from ..errors import (
    CalibrationError,
    CheckpointError,
    NumericsError,
    UnsupportedModelError,
    first_line,
    needs_package,
)
from ..runtime.memory import give_back
from ..runtime.process import build_lock, default_modes
from .in_memory import (
    module_types,
    storage_bytes,
    tensors_of,
    unwrapped,
)
from .side_files import (
    CONFIG,
    DOWNLOADED,
    GENERATION_CONFIG,
    SideFiles,
    has_tokenizer,
    is_legal,
)
from .tensor_file import as_bytes
from .torch_file import is_bin, open_bin

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
HUB = "hf://"  # prefix of a hub id
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
LARGEST_SIZE = 1 << 28  # integers in a config above this are taken for damage
END_BYTES = 4096  # hashed at the beginning and at the end of a tensor, for a fingerprint
COMPARED_ROWS = 4096  # read at a time when two tensors are compared
NAMED = 4  # name patterns that a note lists at most
PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = {  # name in a safetensors header → torch.dtype
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Spec(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.elements * self.dtype.itemsize


class Source(Protocol):
    """A float causal LM that can be read tensor by tensor.

    Attributes:
        name: of the model, for messages.
        config: of the model.
        nbytes: bytes of all tensors.
        specs: shape and dtype of the stored parameters and persistent buffers by the names that the
            adopted model gives them. Set by `adopt`, as are `extras` and `notes`.
        extras: the same of tensors that the model's class does not have, by their stored names;
            they are copied into the output unchanged.
        notes: remarks for the user, such as tensors that are left out.
    """

    name: str
    config: PretrainedConfig
    nbytes: int
    specs: dict[str, Spec]
    extras: dict[str, Spec]
    notes: list[str]

    @property
    def paths(self) -> list[Path]:
        """The directories and files that the model is read from."""

    def adopt(self, model: PreTrainedModel) -> None:
        """Map the stored tensors to those of a model, before the first read.

        Args:
            model: may be on the meta device. In place, its floats get the stored dtypes, and a tied
                parameter whose stored values differ from its twin's is untied.
        """

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of tensors in their stored dtypes, one by one, in any order.

        Args:
            names: of the model's tensors, or of `extras`.

        Raises:
            CheckpointError: for a tensor that is not stored.
        """

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in chunks of `count` rows, of which one at a time is in memory.

        Args:
            name: of the parameter in the model.
            count: rows of a chunk; the last may be shorter.
        """

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, if it has one."""

    def side_files(self) -> SideFiles:
        """The files to copy into an output beside the weights.

        Raises:
            CheckpointError: for a file that cannot be read.
        """


class CheckpointSource:
    """A directory with `config.json` and weights (safetensors or `.bin`), read tensor by tensor.

    Attributes:
        directory: of the checkpoint.
        files: stored tensor name → the file that holds it.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Read the config and the tensors' names; no weights.

        Args:
            directory: of the checkpoint.
            name: of the model, for messages.

        Raises:
            CheckpointError: for files that are missing or cannot be read.
            UnsupportedModelError: for a config that fits no model.
        """
        self.name, self.directory = name, directory
        self.config = _read_config(directory, name)
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

    def adopt(self, model: PreTrainedModel) -> None:
        """Map the stored tensors to a model's by transformers' renamings and conversions."""
        conversions, wanted = WeightConversions(model), model.state_dict()
        stored_specs = {
            name: spec
            for path in sorted(set(self.files.values()))
            for name, spec in tensor_shapes(path).items()
        }
        self._model = model
        self._stored: dict[str, str] = {}
        self._conversions: dict[str, _Conversion] = {}
        unnamed: dict[str, str] = {}
        for stored in sorted(stored_specs, key=loading_order):
            name, pattern = conversions.rename(stored)
            if name not in wanted and stored in wanted:
                name, pattern = conversions.add_prefix(stored)
            if name not in wanted or (pattern is None and name in self._stored):
                unnamed[stored] = name
            elif pattern is None:
                self._stored[name] = stored
            else:
                converter = conversions.converter(pattern)
                conversion = _Conversion(name, converter, [])
                self._conversions.setdefault(name, conversion).parts.append((pattern, stored))
        self.specs = {name: stored_specs[stored] for name, stored in self._stored.items()}
        for conversion in list(self._conversions.values()):
            # A converter names its results only by converting: here on the meta device.
            empty = {
                stored: torch.empty(shape, dtype=dtype, device="meta")
                for stored, (shape, dtype) in (
                    (stored, stored_specs[stored]) for _, stored in conversion.parts
                )
            }
            for name, tensor in self._convert(conversion, empty).items():
                if name in wanted:
                    self._conversions[name] = conversion
                    self.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        self._settle_ties(model)
        _take_dtypes(model, self.specs)
        self.extras, useless = _sorted_out(model, unnamed, stored_specs)
        self.notes = _notes_on(self.extras, useless)

    def _settle_ties(self, model: PreTrainedModel) -> None:
        """Tie as transformers would: where both twins are stored and differ, untie them."""
        for target, source in list(tied_weights(model).items()):
            if target in self._stored and source not in self.specs:
                self.specs[source] = self.specs.pop(target)
                self._stored[source] = self._stored.pop(target)
            elif target in self.specs and not self._same(target, source):
                untie(model, target)
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
        names = list(names)
        stored = {name: name for name in names if name in self.extras}
        left = dict.fromkeys(name for name in names if name not in stored)
        while left:
            name = next(iter(left))
            if name in self._conversions:
                conversion = self._conversions[name]
                parameters = self._convert(
                    conversion, dict(self._read(s for _, s in conversion.parts))
                )
                for parameter in [key for key in left if key in parameters]:
                    del left[parameter]
                    yield parameter, parameters[parameter]
                if name in left:
                    raise CheckpointError(
                        f"{self.name}: '{name}' cannot be made of the stored tensors"
                    )
            elif name in self._stored:
                stored[self._stored[name]] = name
                del left[name]
            else:
                raise CheckpointError(f"{self.name}: the checkpoint has no tensor '{name}'")
        for key, tensor in self._read(stored):
            yield stored[key], tensor

    def _read(self, stored: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(stored name, tensor), file by file."""
        for key in sorted(stored, key=lambda key: str(self.files[key])):
            # Opened for this tensor only: pages of a mapped file count as resident memory.
            yield key, read_tensor(self.files[key], key)

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in chunks of `count` rows; a converted parameter is in memory as a whole."""
        if name in self._conversions:
            ((_, tensor),) = self.tensors([name])
            yield from tensor.split(count)
            return
        if name not in self._stored:
            raise CheckpointError(f"{self.name}: the checkpoint has no tensor '{name}'")
        key = self._stored[name]
        path = self.files[key]
        if is_bin(path):
            for first in range(0, len(read_tensor(path, key)), count):
                yield read_tensor(path, key)[first : first + count]
            return
        for first in range(0, _open_safetensors(path).get_slice(key).get_shape()[0], count):
            yield _open_safetensors(path).get_slice(key)[first : first + count]

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""
        digest = hashlib.sha256(self.config.to_json_string().encode())
        for path in sorted(set(self.files.values())):
            digest.update(path.name.encode())
            if is_bin(path):
                _digest_tensors(digest, open_bin(path))
                continue
            with open(path, "rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
                digest.update(header)
                start = file.tell()
                for entry in json.loads(header).values():
                    if "data_offsets" in entry:
                        first, end = entry["data_offsets"]
                        for at in (first, max(first, end - END_BYTES)):
                            file.seek(start + at)
                            digest.update(file.read(min(END_BYTES, end - first)))
        return digest.hexdigest()

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
                f"{self.name}: '{conversion.name}' cannot be made of the stored tensors: "
                f"{first_line(error)}"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the weights, if there is one."""
        return load_tokenizer(self.directory, self.name) if has_tokenizer(self.directory) else None

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


class ModuleSource:
    """A model in memory, which is read and never changed."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
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
        try:
            model.config.to_json_string()
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{name}: its config cannot be written as JSON: {first_line(error)}"
            ) from error
        self.paths, self._dtype = list(paths), dtype
        self._types = module_types(model)
        generation_config = getattr(model, "generation_config", None)
        self._side_files = SideFiles(dict(files or {}), (), tokenizer, generation_config)
        self._tensors = tensors_of(model)
        self.nbytes = storage_bytes(self._tensors)

    def adopt(self, model: PreTrainedModel) -> None:
        """Map the tensors to those of a model of the same class, by equal names.

        Raises:
            UnsupportedModelError: if a module or tensor of the model in memory is not one that its
                class builds.
        """
        wanted = model.state_dict()
        for name, kind in module_types(model).items():
            if self._types.get(name, kind) is not kind:
                raise UnsupportedModelError(
                    f"{self.name}: '{name}' is a {self._types[name].__name__}, its class has a "
                    f"{kind.__name__} there: save the model under a class that has it"
                )
        for target, source in list(tied_weights(model).items()):
            if target in self._tensors and source in self._tensors:
                left, right = self._tensors[target], self._tensors[source]
                if left.data_ptr() != right.data_ptr() and not torch.equal(left, right):
                    untie(model, target)
        tied = tied_weights(model)
        self.specs, unnamed = {}, dict[str, str]()
        stored_specs = {
            name: Spec(tuple(tensor.shape), self._stored_dtype(tensor))
            for name, tensor in self._tensors.items()
        }
        for name, spec in stored_specs.items():
            if name in tied:
                continue
            if name in wanted:
                self.specs[name] = spec
            else:
                unnamed[name] = name
        _take_dtypes(model, self.specs)
        self.extras, useless = _sorted_out(model, unnamed, stored_specs)
        if useless:
            raise UnsupportedModelError(
                f"{self.name}: its class has no tensor '{useless[0]}', so the model in memory is "
                "another than it makes: save the model under a class that has it"
            )
        self.notes = _notes_on(self.extras, useless)

    def _stored_dtype(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in their present dtypes, sharing memory with the model."""
        for name in names:
            if name not in self._tensors:
                raise CheckpointError(f"{self.name}: the model has no tensor '{name}'")
            yield name, self._tensors[name].detach()

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """A parameter in chunks of `count` rows, sharing memory with the model."""
        ((_, tensor),) = self.tensors([name])
        yield from tensor.split(count)

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, shape, dtype, first and last values."""
        digest = hashlib.sha256(self.config.to_json_string().encode())
        _digest_tensors(digest, self._tensors)
        return digest.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was given with the model, or None."""
        return self._side_files.tokenizer

    def side_files(self) -> SideFiles:
        """The tokenizer, the generation config and the given files."""
        return self._side_files


def text_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """A source's tokenizer, for text. Raises CalibrationError where the source has none."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise CalibrationError(f"{source.name} has no tokenizer to read text with")
    return tokenizer


def _digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add to a hash every tensor's name, shape, dtype, and first and last values."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        for end in (flat[:END_BYTES], flat[-END_BYTES:]):
            digest.update(as_bytes(end))


def open_source(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | None = None,
) -> Source:
    """Open a float model by hub id or directory, from a GGUF file in either, or in memory.

    Args:
        model: hub id, `hf://owner/name[@revision]`, directory, GGUF file, or model.
        tokenizer: of a model in memory; others bring their own.
        gguf_file: name of a GGUF file in `model`, which is dequantized to bfloat16.

    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
        UnsupportedModelError: for a model that is quantized already, or not supported.
    """
    if not isinstance(model, str | Path):
        model = unwrapped(model)
        refuse_quantized(model.config, type(model).__name__)
        read = model.config.name_or_path
        paths = [Path(read)] if read and Path(read).is_dir() else []
        return ModuleSource(model, tokenizer, read or type(model).__name__, paths)
    if gguf_file is not None:
        return _open_gguf(str(model), gguf_file)
    directory = resolve_directory(str(model))
    source = CheckpointSource(directory, str(model))
    refuse_quantized(source.config, source.name)
    return source


def read_config(model: str) -> PretrainedConfig:
    """The config of a hub id or a local directory; no weights are downloaded.

    Raises:
        SmoothqError: if there is no config, or it cannot be read.
    """
    return _read_config(resolve_directory(model, weights=False), model)


def refuse_quantized(config: PretrainedConfig, name: str) -> None:
    """Raise UnsupportedModelError if a model's config says that it is quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", "?")
        )
        raise UnsupportedModelError(
            f"{name} is already quantized (quant_method '{method}'); quantize the float model"
        )


def resolve_directory(model: str, weights: bool = True) -> Path:
    """The local directory of a model; a hub id is downloaded first.

    Args:
        model: a directory, a hub id, or `hf://owner/name[@revision]`.
        weights: whether to download weights too, not just config, tokenizer and side files.

    Raises:
        CheckpointError: if there is no such directory or repo, or the hub cannot be reached.
    """
    path = Path(model)
    try:
        if path.is_dir():
            return path
    except OSError as error:  # such as a name longer than file names may be
        raise CheckpointError(f"model '{model[:40]}…' is no directory: {error.strerror}") from error
    odd = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if odd and not model.startswith(HUB):
        raise CheckpointError(f"model '{model}' is not a directory; give a directory or a hub id")
    repo_id, revision = parse_hub_id(model)
    patterns = [*DOWNLOADED, *(["*.safetensors"] if weights else [])]
    try:
        directory = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        if weights and not any((directory / file).is_file() for file in (SINGLE, INDEX)):
            bins = ["pytorch_model*.bin"]
            snapshot_download(repo_id, revision=revision, allow_patterns=bins)
        return directory
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo_id}' has no revision '{revision}' on the hub") from error
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model '{model}' is neither a local directory nor a model that the hub gave us "
            f"({type(error).__name__}); check the name, the network and your access"
        ) from error


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """Split `hf://owner/name[@revision]` into repo id and revision (None without one).

    A text without `hf://` is returned unchanged as the repo id.

    Raises:
        CheckpointError: for any other text with `hf://`.
    """
    if not text.startswith(HUB):
        return text, None
    repo_id, at, revision = text.removeprefix(HUB).partition("@")
    if not HUB_ID.fullmatch(repo_id) or (at and not revision):
        raise CheckpointError(f"'{text}' is no model of the hub; give hf://owner/name[@revision]")
    return repo_id, revision or None


def untie(model: PreTrainedModel, target: str) -> None:
    """Untie a parameter in place: it becomes a parameter by itself, on the meta device.

    Args:
        model: whose `all_tied_weights_keys` has the parameter.
        target: full name of the parameter.
    """
    remove_tie(model, target)
    _set_tensor(model, target, torch.empty_like(model.get_parameter(target), device="meta"))


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by full name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _take_dtypes(model: PreTrainedModel, specs: dict[str, Spec]) -> None:
    """Set a skeleton's floats to their stored dtypes, and tie again what is tied."""
    for name, tensor in model.state_dict().items():
        if name in specs and tensor.is_floating_point() and specs[name].dtype.is_floating_point:
            _set_tensor(model, name, tensor.to(specs[name].dtype))
    for target, source in tied_weights(model).items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def _sorted_out(
    model: PreTrainedModel, unnamed: dict[str, str], specs: dict[str, Spec]
) -> tuple[dict[str, Spec], list[str]]:
    """Divide stored tensors that the model does not name into (extras, useless).

    extras: of modules that the model's class does not have, such as multi-token prediction layers.
    useless: names of those in modules that it has, whose code does not use them.
    unnamed: stored name → the name that transformers' renamings give it. specs: by stored name.
    """
    modules = {name for name, _ in model.named_modules()}
    extras, useless = {}, []
    for stored, name in unnamed.items():
        if {stored.rpartition(".")[0], name.rpartition(".")[0]} & modules:
            useless.append(stored)
        else:
            extras[stored] = specs[stored]
    return extras, useless


def _notes_on(extras: dict[str, Spec], useless: list[str]) -> list[str]:
    notes = []
    if extras:
        notes.append(
            f"{len(extras)} tensors that the model's class does not know are kept as they are: "
            f"{families_of(extras)}"
        )
    if useless:
        notes.append(
            f"{len(useless)} stored tensors are left out, for the model's code does not use them: "
            f"{families_of(useless)}"
        )
    return notes


def families_of(names: Iterable[str]) -> str:
    """The distinct patterns of tensor names, with `*` for numbers; the first `NAMED`, joined."""
    kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return ", ".join(kinds[:NAMED]) + (f", … ({len(kinds)} kinds)" if len(kinds) > NAMED else "")


def skeleton(source: Source) -> PreTrainedModel:
    """Build a source's model with parameters on the meta device and real buffers, and adopt it.

    Its floats have the stored dtypes, and parameters are tied where the stored values agree.

    Raises:
        CheckpointError: for a tensor that is missing or has another shape.
        UnsupportedModelError: for a float stored in a dtype that needs scales, such as float8.
    """
    model = skeleton_of(source.config, source.name)
    source.adopt(model)
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in model.state_dict().items():
        if name in source.specs:
            _check_spec(source.specs[name], name, tensor, source.name)
        elif name in buffers:
            source.notes.append(f"{name} is not stored: it is as the model's class makes it")
        elif name not in tied_weights(model):
            raise CheckpointError(f"{source.name}: the checkpoint has no tensor '{name}'")
    return model


def _check_spec(spec: Spec, name: str, wanted: Tensor, model: str) -> None:
    """Raise CheckpointError for a wrong shape, UnsupportedModelError for a wrong dtype."""
    if spec.shape != wanted.shape:
        raise CheckpointError(
            f"{model}: tensor '{name}' has shape {spec.shape}, the config asks for "
            f"{tuple(wanted.shape)}"
        )
    if wanted.is_floating_point() and spec.dtype not in PLAIN_FLOATS:
        raise UnsupportedModelError(
            f"{model}: tensor '{name}' is stored as {spec.dtype}, and no quantization_config says "
            "what its numbers stand for; quantize the float model"
        )


def skeleton_of(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """Build the float model of a config, in eval mode, with parameters on the meta device.

    Floats have the dtype that the config names. The config may be a quantized checkpoint's.

    Args:
        config: of the model.
        name: of the model, for messages.

    Raises:
        UnsupportedModelError: for a config that fits no model.
    """
    try:
        model = empty_model(config)
    except Exception as error:  # transformers has no common base for unfit configs
        raise UnsupportedModelError(
            f"{name}: no model can be built from its config: {first_line(error)}"
        ) from error
    # `empty_model` builds in float32, which transformers recorded in the config.
    model.config.dtype = config.dtype
    named = dtype_named_by(config)
    _take_dtypes(model, {n: Spec(tuple(p.shape), named) for n, p in model.named_parameters()})
    model.eval()
    return model


def dtype_named_by(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a config names, or float32 if it names none.

    Raises:
        UnsupportedModelError: for a dtype that is no float.
    """
    named = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnsupportedModelError(f"{config.model_type}: its config says dtype = {named}")
    return dtype


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of a config with parameters on the meta device and real buffers.

    No weight is allocated. Whatever transformers raises for a config that fits no model, this
    raises too.
    """
    with build_lock, default_modes():
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32
            )
        _make_buffers(model)
    return model


def _make_buffers(model: PreTrainedModel) -> None:
    """Give a model on the meta device real buffers, computed as `from_pretrained` computes them.

    A persistent buffer is zero until it is read, unless the model's class initialises it. Raises
    UnsupportedModelError for a non-persistent buffer that only `__init__` computes: transformers
    would load the model with uninitialised memory there.
    """
    computed: dict[str, tuple[Tensor, int]] = {}
    for prefix, module in list(model.named_modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.is_meta:  # made by an operator that ignores the default device
                setattr(module, name, nn.Parameter(weight.data.to("meta"), weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            real = torch.zeros_like(buffer, device="cpu")
            setattr(module, name, real)
            if name in module._non_persistent_buffers_set and real.numel():
                computed[f"{prefix}.{name}"] = real, real._version
    for parameter in model.parameters():
        mark_initialized(parameter)
    initialize_unmarked(model)
    for name, (real, version) in computed.items():
        if model.get_buffer(name) is real and real._version == version:
            raise UnsupportedModelError(
                f"its buffer '{name}' is not stored, and its class does not compute it anew when "
                "transformers loads the model"
            )


def load_module(module: nn.Module, prefix: str, source: Source, dtype: torch.dtype | None) -> None:
    """Fill a module's parameters and persistent buffers from a source, with copies.

    A buffer that is not stored keeps the values that the model's class computed.

    Args:
        module: of the model that the source has adopted.
        prefix: full name of the module.
        source: of the weights.
        dtype: of the floats; None keeps the stored dtypes.

    Raises:
        CheckpointError: for a missing tensor or a wrong shape.
        NumericsError: for NaN or Inf.
    """
    expected = module.state_dict()
    unstored = {n for n, _ in module.named_buffers() if f"{prefix}.{n}" not in source.specs}
    names = {f"{prefix}.{name}": name for name in expected if name not in unstored}
    loaded = {}
    for full, tensor in source.tensors(names):
        check_weight(tensor, full, tuple(expected[names[full]].shape), source.name)
        # A copy, never a view: transforms write in place.
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        loaded[names[full]] = tensor.to(wanted, copy=True)
    module.load_state_dict(loaded, strict=False, assign=True)
    module.requires_grad_(False)


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


def _read_config(directory: Path, name: str) -> PretrainedConfig:
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{name} holds an adapter, not a whole model; merge it and quantize that: "
            f"from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained("
            f"'{directory}', dtype='auto').merge_and_unload().save_pretrained('MERGED')"
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json in {directory}; is it a model directory?")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers has no common base for damaged files
        raise UnsupportedModelError(
            f"{name}: its config cannot be read: {first_line(error)}"
        ) from error
    return config


def check_sizes(config: PretrainedConfig, tensors: Collection[str], name: str) -> None:
    """Refuse a damaged config, which would make transformers build until memory is exhausted.

    Args:
        config: of the model.
        tensors: names of the stored tensors; a model has at most as many layers.
        name: of the model, for messages.

    Raises:
        UnsupportedModelError: for an integer above `LARGEST_SIZE` or an impossible layer count.
    """
    text = config.get_text_config(decoder=True)
    for field, value in (config.to_dict() | text.to_dict()).items():
        if isinstance(value, int) and abs(value) > LARGEST_SIZE:
            raise UnsupportedModelError(f"{name}: its config says {field} = {value}")
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or not 0 < layers <= len(tensors):
        raise UnsupportedModelError(
            f"{name}: its config says {layers} layers, with {len(tensors)} tensors stored"
        )


def tensor_files(directory: Path, name: str) -> dict[str, Path]:
    """Stored tensor name → its file, for the weight files that transformers would load.

    Args:
        directory: of the checkpoint.
        name: of the model, for messages.

    Raises:
        CheckpointError: if there are no weight files, one is missing, or one cannot be read.
    """
    for file in (_named_in_config(directory), *WEIGHTS):
        if file is not None and (directory / file).is_file():
            break
    else:
        raise CheckpointError(f"{name}: no {SINGLE} or {INDEX} in {directory}{_other(directory)}")
    paths = [directory / file]
    if file.endswith(".index.json"):
        paths = [directory / shard for shard in _shards(directory / file, name)]
    # Names come from the files, not the index, and the last file with a name wins: transformers'
    # rules.
    return {tensor: path for path in paths for tensor in tensor_names(path)}


def _named_in_config(directory: Path) -> str | None:
    """The weight file that config.json names as `transformers_weights`, or None."""
    try:
        named = json.loads((directory / CONFIG).read_bytes())["transformers_weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and Path(named).name == named else None


def _shards(index: Path, name: str) -> list[str]:
    """The shards that an index file lists, all of which exist."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        elsewhere = not all(Path(file).name == file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{name}: {index.name} cannot be read: {first_line(error)}"
        ) from error
    if elsewhere:
        raise CheckpointError(f"{name}: {index.name} names a file that lies elsewhere")
    for file in files:
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{name}: shard {file} is missing")
    return files


def _other(directory: Path) -> str:
    """The end of an error message: how to convert a weight variant, if the directory has one."""
    variants = sorted(path.name for path in directory.glob("model*.*.safetensors*"))
    if variants:
        variant = variants[0].split(".")[1]
        return (
            f", only the variant '{variant}'; save it as the main one: from transformers import "
            f"AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('{directory}', "
            f"variant='{variant}', dtype='auto').save_pretrained('{directory}')"
        )
    return ""


def tensor_names(path: Path) -> list[str]:
    """The names of all tensors in a weight file; no data is read."""
    return list(open_bin(path)) if is_bin(path) else list(_open_safetensors(path).keys())


def tensor_shapes(path: Path) -> dict[str, Spec]:
    """The shape and dtype of every tensor in a weight file, by name; no data is read.

    Raises:
        CheckpointError: for a file that cannot be read, or a dtype that PyTorch does not have.
    """
    if is_bin(path):
        return {
            name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in open_bin(path).items()
        }
    file = _open_safetensors(path)
    headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    specs = {}
    for name, header in headers.items():
        if header.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor '{name}' has dtype {header.get_dtype()}, which cannot be read"
            )
        specs[name] = Spec(tuple(header.get_shape()), DTYPES[header.get_dtype()])
    return specs


def read_tensor(path: Path, key: str) -> Tensor:
    """A tensor of a weight file, on the CPU; the file stays mapped while the tensor lives.

    Args:
        path: of the weight file.
        key: name of the tensor in the file.

    Raises:
        CheckpointError: if the file or the tensor cannot be read.
    """
    if is_bin(path):
        return open_bin(path)[key]
    try:
        tensor: Tensor = _open_safetensors(path).get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: tensor '{key}' cannot be read: {error}") from error
    return tensor


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _open_gguf(model: str, gguf_file: str) -> Source:
    directory = resolve_directory(model) if not Path(model).is_file() else Path(model).parent
    if not (directory / gguf_file).is_file():
        raise CheckpointError(f"{directory} has no GGUF file '{gguf_file}'")
    needs_package("gguf", "gguf")
    try:
        tokenizer = load_tokenizer(directory, gguf_file, gguf_file)
        float_model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=gguf_file, dtype=torch.float32
        )
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{gguf_file}: transformers cannot read it: {error}") from error
    # transformers has dequantized it to float32, a dtype that few models need.
    del float_model.config.quantization_config
    float_model.config.dtype = torch.bfloat16
    beside = SideFiles.of(directory).files.items()
    return ModuleSource(
        float_model,
        tokenizer,
        gguf_file,
        paths=[directory, directory / gguf_file],
        files={name: path for name, path in beside if is_legal(name)},
        dtype=torch.bfloat16,
    )
