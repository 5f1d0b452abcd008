"""Weight files, safetensors or `.bin`: which a directory has, what is in them, reading it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, first_line
from .side_files import CONFIG
from .tensor_file import as_bytes
from .torch_file import is_bin, open_bin

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
END_BYTES = 4096  # hashed at the beginning and at the end of a tensor, for a fingerprint
NAMED = 4  # name patterns that `families_of` lists at most
DTYPES: dict[str, torch.dtype] = {  # name in a safetensors header → torch.dtype
    "BOOL": torch.bool,
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
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


def copies(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, a copy of its tensor) of a weight file, which is opened once."""
    read: Callable[[str], Tensor] = (
        open_bin(path).__getitem__ if is_bin(path) else _open_safetensors(path).get_tensor
    )
    for key in keys:
        yield key, read(key).clone()


def read_part(path: Path, key: str, *index: slice) -> Tensor:
    """A part of a tensor of a weight file, on the CPU; only it is read.

    Args:
        path: of the weight file.
        key: name of the tensor in the file.
        index: what to take along the first axes.
    """
    stored = open_bin(path)[key] if is_bin(path) else _open_safetensors(path).get_slice(key)
    part: Tensor = stored[index]
    return part


def read_rows(path: Path, key: str, count: int) -> Iterator[Tensor]:
    """A tensor of a weight file in chunks of `count` rows, of which the last may be shorter.

    The file is opened for each: pages of a mapped file count as resident memory.
    """
    for first in range(0, tensor_shapes(path)[key].shape[0], count):
        yield read_part(path, key, slice(first, first + count))


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add to a hash every tensor's name, shape, dtype, and first and last values."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        for end in (flat[:END_BYTES], flat[-END_BYTES:]):
            digest.update(as_bytes(end))


def digest_file(digest: Any, path: Path) -> None:
    """Add to a hash the same of a weight file's tensors, and the file's name."""
    digest.update(path.name.encode())
    if is_bin(path):
        digest_tensors(digest, open_bin(path))
        return
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


def families_of(names: Iterable[str]) -> str:
    """The distinct patterns of tensor names, with `*` for numbers; the first `NAMED`, joined."""
    kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return ", ".join(kinds[:NAMED]) + (f", … ({len(kinds)} kinds)" if len(kinds) > NAMED else "")
