"""Rotations of activations, X ← X R, that do not change the output of a model.

A weight that reads a rotated activation becomes W R; one that writes it becomes Rᵀ W, and its bias
b R. All are folded in place, in float64. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv
2405.16406). R1, R2 and R4 are SpinQuant's names: of the residual stream, value→output per head, and
down_proj's input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..architectures import (
    BlockGraph,
    Parts,
    Rows,
    Site,
    WeightRef,
)
from .chunks import columns_of, rows_of
from .hadamard import Hadamard
from .norm_fusion import take_norm


def rotate_input(matrix: Tensor, rotation: Hadamard, inverse: bool = False) -> None:
    """W ← W R, in place: for a weight that reads a rotated activation.

    Args:
        matrix: W, float (N, K).
        rotation: R, of order K.
        inverse: use Rᵀ for R.
    """
    apply = rotation.apply_transposed if inverse else rotation.apply
    for rows in rows_of(matrix):
        rows.copy_(apply(rows.double()))


def rotate_reader(matrix: Tensor, gain: Tensor, rotation: Hadamard) -> None:
    """W ← W diag(γ) R, in place: for a weight that reads a norm's rotated output.

    Args:
        matrix: W, float (N, K).
        gain: γ of the norm, float64 (K,).
        rotation: R, of order K.
    """
    for rows in rows_of(matrix):
        rows.copy_(rotation.apply(rows.double() * gain))


def rotate_output(
    matrix: Tensor, bias: Tensor | None, rotation: Hadamard, inverse: bool = False
) -> None:
    """W ← Rᵀ W and b ← b R, in place: for a weight whose output is rotated.

    Args:
        matrix: W, float (N, K).
        bias: b, float (N,), or None.
        rotation: R, of order N.
        inverse: use Rᵀ for R.
    """
    apply = rotation.apply_transposed if inverse else rotation.apply
    for columns in columns_of(matrix):
        columns.copy_(apply(columns.double().t().contiguous()).t())
    if bias is not None:
        bias.copy_(apply(bias.double()))


def rotate_residual(
    block: nn.Module, graph: BlockGraph, rotation: Hadamard, inverse: bool = False
) -> None:
    """Rotate the residual stream (R1) in a block, in place: its readers and its writers.

    Norms must be fused before (`fuse_norms`). The input of the first block must be rotated too, and
    the output of the last one rotated back.

    Args:
        block: linearized.
        graph: of the block.
        rotation: R, of order hidden size; with `keeps_mean` where the norms subtract the mean.
        inverse: use Rᵀ for R, which undoes the rotation.
    """
    for site in graph.sites:
        if site.reads == "residual":
            for reader in site.all_readers:
                rotate_input(reader.view(block), rotation, inverse)
    for writer in graph.residual_writers:
        rotate_output(writer.view(block), writer.bias_view(block), rotation, inverse)


def rotate_entry(model: nn.Module, parts: Parts, rotation: Hadamard) -> None:
    """Rotate the first block's input offline: in the embeddings whose rows it is a sum of."""
    for name in parts.entering:
        rotate_input(WeightRef(f"{name}.weight").view(model), rotation)


def head_fold(
    model: nn.Module, parts: Parts, rotation: Hadamard, offset: float
) -> Callable[[Tensor], None]:
    """A function that folds γ of the final norm, and the inverse of R1, into rows of the head.

    It does W ← W diag(γ) R in place. γ is set to 1 in the model at once.

    Args:
        model: a causal LM, its final norm without a bias, its head not tied.
        parts: its parts.
        rotation: R, of order hidden size.
        offset: of the final norm, as of a `Norm`.
    """
    assert parts.final_norm is not None, "a folded rotation ends at the final norm"
    gain = take_norm(model, parts.final_norm, offset)
    return partial(rotate_reader, gain=gain, rotation=rotation)


def rotate_value_output(block: nn.Module, site: Site, rotation: Hadamard) -> None:
    """Rotate every head's values (R2), and undo it in the output projection, in place.

    Args:
        block: linearized.
        site: the input of the output projection.
        rotation: R, of order head_dim; one for all heads, as grouped-query attention needs.

    Raises:
        ValueError: the site has no value rows as producer.
    """
    producer = site.producer
    if not isinstance(producer, Rows) or producer.heads is None:
        raise ValueError(f"site '{site.name}' does not read attention values")
    for ref in producer.refs:
        values, bias = ref.view(block), ref.bias_view(block)
        for first in range(0, len(values), producer.heads.dim):
            rows = slice(first, first + producer.heads.dim)
            rotate_output(values[rows], None if bias is None else bias[rows], rotation)
    for reader in site.all_readers:
        for part in rows_of(reader.view(block)):
            per_head = part.double().unflatten(1, (producer.heads.query, producer.heads.dim))
            part.copy_(rotation.apply(per_head).flatten(1))
