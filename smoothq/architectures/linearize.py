"""Linearized blocks: every weight matrix of a block as an `nn.Linear`.

Transforms, rounding and quantized modules work on these. Some blocks of transformers store a matrix
transposed (`Conv1D`), some store all experts in one 3-D parameter. A linearized block computes the
same; `restore_block` undoes it.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import SeparateExperts as SeparateExperts
from .experts import close_experts, is_experts, linear_of, open_experts, parameter_of


def linearize_block(block: nn.Module) -> None:
    """Replace every `Conv1D` and every expert of a block by an `nn.Linear`, in place.

    Args:
        block: a block as transformers builds it, on any device.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, Conv1D):
            block.set_submodule(name, linear_of(module.weight.data.t(), module.bias))
        elif is_experts(module):
            open_experts(module)


def restore_block(block: nn.Module, stock: nn.Module) -> None:
    """Undo `linearize_block`, in place.

    Args:
        block: a linearized block.
        stock: a block as transformers builds it, on any device; its classes are restored.
    """
    for module in list(block.modules()):
        if isinstance(module, SeparateExperts):
            close_experts(module)
    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear):
            block.get_submodule(name).__class__ = type(module)
        if isinstance(module, Conv1D):
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            closed = Conv1D(linear.out_features, linear.in_features)
            closed.weight = parameter_of(linear.weight.data.t())
            closed.bias = parameter_of(linear.bias.data)
            block.set_submodule(name, closed)
