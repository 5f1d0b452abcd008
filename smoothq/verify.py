"""Verify a quantized checkpoint: hashes, names, shapes, dtypes and values of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .checkpoint.check import check_tensors
from .checkpoint.manifest import MANIFEST, Manifest, sha256_of
from .checkpoint.model_class import class_of
from .checkpoint.model_config import check_sizes, read_config
from .checkpoint.tensor_file import as_bytes, is_intact
from .checkpoint.weight_files import read_tensor, tensor_files
from .compat import build_model
from .errors import CheckpointError, SmoothqError, first_line
from .kernels import largest_multiplier
from .plan.account import codes_of
from .plan.config import quantization_of
from .plan.install import install


@dataclass(frozen=True)
class VerifyResult:
    """The extent of a verified checkpoint.

    Attributes:
        tensors: number of tensors.
        bytes: their total size.
        files: number of other files, such as config.json.
    """

    tensors: int
    bytes: int
    files: int


def verify_checkpoint(
    directory: Path,
    progress: Callable[[int, int, str], None] | None = None,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """Read a whole checkpoint and compare it with its manifest, its config and its number formats.

    Args:
        directory: the checkpoint.
        progress: called with (tensors so far, number of tensors, "verify") for each tensor.
        trust_remote_code: whether to run code beside the model, of whose class the tensors are.

    Returns: what was verified.

    Raises:
        CheckpointError: a file or tensor is missing, unexpected or changed, or has impossible
            values; the message names the first.
        SmoothqError: the config cannot be resolved into a plan.
    """
    name = str(directory)
    if not directory.is_dir():
        raise CheckpointError(f"'{directory}' is not a directory")
    manifest = Manifest.read(directory)
    for file, digest in manifest.files.items():
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing")
        if sha256_of(directory / file) != digest:
            raise CheckpointError(f"{directory / file} is not the file that was written")
    config, files = read_config(name, trust_remote_code), tensor_files(directory, name)
    check_sizes(config, files, name)
    model = _empty_model(config, name)
    check_tensors(model, [str(path) for path in sorted(set(files.values()))])
    hashes = {
        name: (dtype, digest)
        for dtype, tensors in manifest.tensors.items()
        for name, digest in tensors.items()
    }
    if set(files) != set(hashes):
        odd = min(set(files) ^ set(hashes))
        raise CheckpointError(f"{directory}: {MANIFEST} and the files do not agree on '{odd}'")
    # Other buffers, such as masks, and extra tensors may contain any values.
    judged = codes_of(model) | {name for name, _ in model.named_parameters()}
    total = 0
    for number, (tensor_name, (dtype, digest)) in enumerate(hashes.items()):
        tensor = read_tensor(files[tensor_name], tensor_name)
        if progress is not None:
            progress(number, len(files), "verify")
        same = str(tensor.dtype) == f"torch.{dtype}"
        if not same or not is_intact([as_bytes(tensor)], digest):
            raise CheckpointError(f"{directory}: tensor '{tensor_name}' is not what was written")
        sane = tensor_name not in judged or _is_sane(tensor_name.rpartition(".")[2], tensor)
        if not sane:
            raise CheckpointError(f"{directory}: tensor '{tensor_name}' has impossible values")
        total += tensor.nbytes
    return VerifyResult(len(files), total, len(manifest.files))


def _empty_model(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The quantized model of a config, on the meta device."""
    quantization = quantization_of(config, name)
    try:
        with torch.device("meta"):
            model = build_model(class_of(config), config)
        install(model, quantization.plan_for(model))
    except SmoothqError:
        raise
    except Exception as error:  # transformers raises many types for an invalid config
        raise CheckpointError(
            f"{name}: no model can be built from its config: {first_line(error)}"
        ) from error
    return model


def _is_sane(kind: str, values: Tensor) -> bool:
    """Whether the values of a tensor are possible: multipliers in range, other floats finite.

    kind: the last part of the tensor's name, such as `weight_scale`; scales must also be nonzero.
    """
    if kind == "weight_multiplier":
        return bool(((values != 0) & (values.abs() <= largest_multiplier(4))).all())
    if kind in ("weight_scale", "scale"):
        return bool((torch.isfinite(values) & (values != 0)).all())
    if kind == "multiplier":
        return bool((values > 0).all())
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
