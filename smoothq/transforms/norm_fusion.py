"""Norm fusion: a norm's weight moves into the linears that read it.

diag(γ) does not commute with a rotation, x / rms(x) does; so γ (and a LayerNorm's β) must be in the
readers before the residual stream is rotated. Source: QuaRot (arXiv 2404.00456), section 4.
"""

from __future__ import annotations

import torch
from torch import nn

from ..architectures import BlockGraph, Norm, WeightRef


def fuse_norm(block: nn.Module, norm: Norm, readers: tuple[WeightRef, ...]) -> None:
    """Fold a norm into its readers: W ← W · γ, b ← b + W β; then γ = 1 and β = 0.

    Works in place, in float64, and keeps the function. block: any module that holds the tensors.
    """
    weight = block.get_parameter(norm.weight).data
    bias = None if norm.bias is None else block.get_parameter(norm.bias).data
    for reader in readers:
        matrix, reader_bias = reader.view(block), reader.bias_view(block)
        if bias is not None:
            if reader_bias is None:
                raise ValueError(f"{reader.tensor} has no bias to take {norm.bias} into")
            reader_bias.copy_(reader_bias.double() + matrix.double() @ bias.double())
        matrix.copy_(matrix.double() * weight.double())
    torch.nn.init.ones_(weight)
    if bias is not None:
        torch.nn.init.zeros_(bias)


def fuse_norms(block: nn.Module, graph: BlockGraph) -> None:
    """Fold every norm of a block into the linears that read it."""
    for site in graph.sites:
        if isinstance(site.producer, Norm):
            fuse_norm(block, site.producer, site.all_readers)
