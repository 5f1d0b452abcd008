"""Rotations that keep the function: they act on the right of activations, X ← X R.

A reader of a rotated activation becomes W ← W R, a writer W ← Rᵀ W, b ← b R. All are folded in
float64. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406); names R1, R2, R4 are
SpinQuant's: residual stream, value→output per head, and down_proj's input.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..architectures import BlockGraph, Norm, Parts, Rows, Site, WeightRef
from .hadamard import Hadamard
from .norm_fusion import fuse_norm

ROW_CHUNK = 8192  # rows folded at a time: an embedding in float64 would be four times its size


def rotate_input(matrix: Tensor, rotation: Hadamard, inverse: bool = False) -> None:
    """W ← W R (or W Rᵀ) in place, in float64: for a weight that reads a rotated activation."""
    apply = rotation.apply_transposed if inverse else rotation.apply
    for rows in matrix.split(ROW_CHUNK):
        rows.copy_(apply(rows.double()))


def rotate_output(
    matrix: Tensor, bias: Tensor | None, rotation: Hadamard, inverse: bool = False
) -> None:
    """W ← Rᵀ W, b ← b R (or with Rᵀ for R) in place, in float64: for a weight that writes."""
    apply = rotation.apply_transposed if inverse else rotation.apply
    matrix.copy_(apply(matrix.double().t().contiguous()).t())
    if bias is not None:
        bias.copy_(apply(bias.double()))


def rotate_residual(
    block: nn.Module, graph: BlockGraph, rotation: Hadamard, inverse: bool = False
) -> None:
    """Rotate the residual stream inside a block (R1): its readers and its writers.

    The norms must be fused before (`fuse_norms`), and what enters and leaves the stack of blocks
    must be rotated as well. Where the norms subtract the mean, the rotation must keep it.
    """
    for site in graph.sites:
        if site.reads == "stream":
            for reader in site.all_readers:
                rotate_input(reader.view(block), rotation, inverse)
    for writer in graph.residual_writers:
        rotate_output(writer.view(block), writer.bias_view(block), rotation, inverse)


def rotate_ends_offline(model: nn.Module, parts: Parts, rotation: Hadamard, folds: bool) -> None:
    """Fold R1 into what enters the stack of blocks and, if it folds there, what reads its end.

    Learned positions are rotated always, embedding and head with `folds` only: else they stay, and
    the rotation must run at both ends.
    """
    if parts.positions is not None:
        rotate_input(WeightRef(f"{parts.positions}.weight").view(model), rotation)
    if folds:
        head = WeightRef(f"{parts.head}.weight")
        fuse_norm(model, Norm(f"{parts.final_norm}.weight"), (head,))
        rotate_input(head.view(model), rotation)
        rotate_input(WeightRef(f"{parts.embedding}.weight").view(model), rotation)


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
        matrix = reader.view(block)
        per_head = matrix.double().unflatten(1, (producer.heads.query, producer.heads.dim))
        matrix.copy_(rotation.apply(per_head).flatten(1))
