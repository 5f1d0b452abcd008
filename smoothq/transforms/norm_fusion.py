"""Norm fusion: a norm's weight and bias are folded into the linears that read its output.

diag(γ) does not commute with a rotation, x / rms(x) does; so γ (and a LayerNorm's β) must be in the
readers before the residual stream is rotated. Source: QuaRot (arXiv 2404.00456), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architectures import BlockGraph, Norm, WeightRef
from .chunks import rows_of


def fuse_norm(block: nn.Module, norm: Norm, readers: tuple[WeightRef, ...]) -> None:
    """Fold a norm into its readers: W ← W · γ, b ← b + W β; then γ = 1 and β = 0.

    In place, in float64. The output of the block does not change.

    Args:
        block: any module that has the parameters.
        norm: its γ is `offset + weight`.
        readers: all weights that read its output. A linear without a bias gets one if the norm has
            a bias.

    Raises:
        ValueError: the norm has a bias, and a reader that is no `nn.Linear` has none.
    """
    weight, bias = block.get_parameter(norm.weight).data, norm.bias_view(block)
    scale = weight.double() + norm.offset
    for reader in readers:
        matrix = reader.view(block)
        if bias is not None:
            reader_bias = _bias(block, reader)
            added = torch.cat([rows.double() @ bias.double() for rows in rows_of(matrix)])
            reader_bias.copy_(reader_bias.double() + added)
        for rows in rows_of(matrix):
            rows.copy_(rows.double() * scale)
    weight.fill_(1 - norm.offset)
    if bias is not None:
        bias.zero_()


def take_norm(module: nn.Module, name: str, offset: float = 0.0) -> Tensor:
    """γ of a norm, float64 (K,), which is set to 1 in place; the caller folds it into readers.

    Args:
        module: any module that has the norm.
        name: the full name of the norm within it.
        offset: as of a `Norm`.
    """
    weight = module.get_submodule(name).get_parameter("weight").data
    gain = weight.double() + offset
    weight.fill_(1 - offset)
    return gain


def fuse_norms(block: nn.Module, graph: BlockGraph) -> None:
    """Fold every norm of a linearized block into the linears that read it, in place."""
    for site in graph.sites:
        if isinstance(site.producer, Norm):
            fuse_norm(block, site.producer, site.all_readers)


def _bias(block: nn.Module, reader: WeightRef) -> Tensor:
    """The bias of a reader; a zero one is added to a linear that has none."""
    linear = block.get_submodule(reader.module)
    if linear.bias is None:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{reader.tensor} has no bias to take that of a norm into")
        zeros = linear.weight.data.new_zeros(linear.out_features)
        linear.bias = nn.Parameter(zeros, requires_grad=False)
    bias = reader.bias_view(block)
    assert bias is not None
    return bias
