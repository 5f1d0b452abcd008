"""Compares the tensors in a checkpoint's files with those of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from ..compat import WeightConversions, tied_weights
from ..errors import CheckpointError
from .weight_files import Spec, tensor_shapes


def check_tensors(model: PreTrainedModel, files: list[str], renames: bool = False) -> None:
    """Check that files hold the tensors of a model, by name, shape and dtype.

    Further tensors are allowed if they belong to modules that the model's class does not have. A
    float may be stored in another float dtype.

    Args:
        model: may be on the meta device.
        files: paths of the checkpoint's weight files.
        renames: whether transformers renames the tensors, as of `renaming_of_text_model`.

    Raises:
        CheckpointError: for a missing or unknown tensor, or one of another shape or dtype.
    """
    expected = dict(model.state_dict())
    tied = set(tied_weights(model))
    stored: dict[str, Spec] = {}
    for file in files:
        stored |= tensor_shapes(Path(file))
    if renames:
        renamed = WeightConversions(model).rename_alone
        stored = {renamed(name): spec for name, spec in stored.items()}
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


def renaming_of_text_model(model: PreTrainedModel, files: list[str]) -> Callable[[str], str] | None:
    """The renaming by which a model is the text model of a checkpoint with towers, or None.

    Args:
        model: the float model, before any of its modules is replaced.
        files: paths of the checkpoint's weight files.

    Returns:
        A function: stored name → name in the model. None where the names are the same, and where
        transformers knows no renaming that leads to the model's embedding.
    """
    embedding = model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    wanted = f"{names[id(embedding)]}.weight"
    stored = {name for file in files for name in tensor_shapes(Path(file))}
    if wanted in stored or not stored:
        return None
    renamed = WeightConversions(model).rename_alone
    return renamed if wanted in map(renamed, stored) else None
