"""Rotations that keep the function: they act on the right of activations, X ← X R.

A reader of a rotated activation becomes W ← W R, a writer W ← Rᵀ W, b ← b R. All are folded in
float64. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406); names R1, R2, R4 are
SpinQuant's: residual stream, value→output per head, and down_proj's input.
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
    """W ← W R (or W Rᵀ) in place, in float64: for a weight that reads a rotated activation."""
    apply = rotation.apply_transposed if inverse else rotation.apply
    for rows in rows_of(matrix):
        rows.copy_(apply(rows.double()))


def rotate_reader(matrix: Tensor, gain: Tensor, rotation: Hadamard) -> None:
    """W ← W diag(γ) R in place, in float64: for a weight that reads a norm. gain: γ, (K,)."""
    for rows in rows_of(matrix):
        rows.copy_(rotation.apply(rows.double() * gain))


def rotate_output(
    matrix: Tensor, bias: Tensor | None, rotation: Hadamard, inverse: bool = False
) -> None:
    """W ← Rᵀ W, b ← b R (or with Rᵀ for R) in place, in float64: for a weight that writes."""
    apply = rotation.apply_transposed if inverse else rotation.apply
    for columns in columns_of(matrix):
        columns.copy_(apply(columns.double().t().contiguous()).t())
    if bias is not None:
        bias.copy_(apply(bias.double()))


def rotate_residual(
    block: nn.Module, graph: BlockGraph, rotation: Hadamard, inverse: bool = False
) -> None:
    """Rotate the residual stream inside a block (R1): its readers and its writers.

    The norms must be fused before (`fuse_norms`), and what enters the stack of blocks and what
    leaves it must be rotated and rotated back. Where the norms subtract the mean, the rotation must
    keep it.
    """
    for site in graph.sites:
        if site.reads == "stream":
            for reader in site.all_readers:
                rotate_input(reader.view(block), rotation, inverse)
    for writer in graph.residual_writers:
        rotate_output(writer.view(block), writer.bias_view(block), rotation, inverse)


def rotate_entry(model: nn.Module, parts: Parts, rotation: Hadamard) -> None:
    """Rotate what enters the stack of blocks offline, in the embeddings that it is the sum of."""
    for name in parts.entering:
        rotate_input(WeightRef(f"{name}.weight").view(model), rotation)


def head_fold(
    model: nn.Module, parts: Parts, rotation: Hadamard, offset: float
) -> Callable[[Tensor], None]:
    """What undoes R1 in rows of the head: W ← W diag(γ) R, where γ is the final norm's weight.

    The final norm is left with 1, and must have no bias. offset: as of a `Norm`.
    """
    gain = take_norm(model, parts.final_norm, offset)
    return partial(rotate_reader, gain=gain, rotation=rotation)


def rotate_value_output(block: nn.Module, site: Site, rotation: Hadamard) -> None:
    """Rotate every head's values (R2) and undo it in the output projection.

    rotation: order head_dim, shared by all heads, as grouped-query attention needs.
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
