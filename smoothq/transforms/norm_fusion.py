"""Norm fusion: a norm's weight moves into the linears that read it.

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

    Works in place, in float64, and keeps the function. block: any module that holds the tensors.
    A linear without a bias gets one where β asks for it.
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
    """γ of a norm by its module's name, float64 (K,), for readers folded apart; 1 is left.

    offset: as of a `Norm`.
    """
    weight = module.get_submodule(name).get_parameter("weight").data
    gain = weight.double() + offset
    weight.fill_(1 - offset)
    return gain


def fuse_norms(block: nn.Module, graph: BlockGraph) -> None:
    """Fold every norm of a block into the linears that read it."""
    for site in graph.sites:
        if isinstance(site.producer, Norm):
            fuse_norm(block, site.producer, site.all_readers)


def _bias(block: nn.Module, reader: WeightRef) -> Tensor:
    """The bias of a reader, made where there is none."""
    linear = block.get_submodule(reader.module)
    if linear.bias is None:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{reader.tensor} has no bias to take that of a norm into")
        zeros = linear.weight.data.new_zeros(linear.out_features)
        linear.bias = nn.Parameter(zeros, requires_grad=False)
    bias = reader.bias_view(block)
    assert bias is not None
    return bias
