"""Compares the tensors in a checkpoint's files with those of a model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..compat import tied_weights
from ..errors import CheckpointError
from .weight_files import Spec, tensor_shapes


def check_tensors(model: PreTrainedModel, files: list[str]) -> None:
    """Check that files hold the tensors of a model, by name, shape and dtype.

    Further tensors are allowed if they belong to modules that the model's class does not have. A
    float may be stored in another float dtype.

    Args:
        model: may be on the meta device.
        files: paths of the checkpoint's weight files.

    Raises:
        CheckpointError: for a missing or unknown tensor, or one of another shape or dtype.
    """
    expected = dict(model.state_dict())
    tied = set(tied_weights(model))
    stored: dict[str, Spec] = {}
    for file in files:
        stored |= tensor_shapes(Path(file))
    missing = sorted(set(expected) - set(stored) - tied)
    modules = {name for name, _ in model.named_modules()}
    foreign = sorted(set(stored) - set(expected))
    extra = [name for name in foreign if name.rpartition(".")[0] in modules]
    if missing or extra:
        what, names = ("missing", missing) if missing else ("unknown", extra)
        raise CheckpointError(
            f"{len(names)} tensors are {what} in the checkpoint, the first '{names[0]}'; "
            "it is incomplete, edited, or of another version of smoothq"
        )
    for name in sorted(set(stored) & set(expected)):
        (shape, dtype), wanted = stored[name], expected[name]
        floats = dtype.is_floating_point and wanted.dtype.is_floating_point
        if shape != tuple(wanted.shape) or not (floats or dtype == wanted.dtype):
            raise CheckpointError(
                f"tensor '{name}' is {dtype} {shape} in the checkpoint, "
                f"its recipe asks for {wanted.dtype} {tuple(wanted.shape)}"
            )
