"""Linearized blocks: every weight matrix of a block as an `nn.Linear`.

Transforms, rounding and quantized modules work on these. Some blocks of transformers store a matrix
transposed (`Conv1D`), some store all experts in one 3-D parameter. A linearized block computes the
same; `restore_block` undoes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..compat import (
    experts_are_transposed,
    experts_have_bias,
    gated,
    mark_initialized,
)
from .mixin import Mixin, mix_in, take_out

EXPERT_MATRICES = ("gate_up_proj", "down_proj")


@mark_initialized  # transformers would initialise the parameters that it had
class SeparateExperts(Mixin):
    """Mixed into an experts module of transformers: one linear an expert.

    Attributes:
        gate_up_proj: linears K → 2 · width.
        down_proj: linears width → K.
    """

    gate_up_proj: nn.ModuleList
    down_proj: nn.ModuleList

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float (tokens, K).
            experts: int64 (tokens, k), the experts that each token is routed to.
            weights: float (tokens, k), of these experts.

        Returns:
            float (tokens, K).
        """
        result = torch.zeros_like(hidden_states)
        for expert in experts.unique().tolist():
            token, place = torch.where(experts == expert)
            inner = gated(self, self.gate_up_proj[expert](hidden_states[token]))
            output = self.down_proj[expert](inner) * weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result


def is_experts(module: nn.Module) -> bool:
    """Whether a module of transformers stores experts in 3-D parameters."""
    return all(
        isinstance(matrix := getattr(module, name, None), nn.Parameter) and matrix.dim() == 3
        for name in EXPERT_MATRICES
    )


def linearize_block(block: nn.Module) -> None:
    """Replace every `Conv1D` and every expert of a block by an `nn.Linear`, in place.

    Args:
        block: a block as transformers builds it, on any device.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, Conv1D):
            block.set_submodule(name, _linear(module.weight.data.t(), module.bias))
        elif is_experts(module):
            for matrix in EXPERT_MATRICES:
                _separate(module, matrix)
            mix_in(module, SeparateExperts)


def restore_block(block: nn.Module, stock: nn.Module) -> None:
    """Undo `linearize_block`, in place.

    Args:
        block: a linearized block.
        stock: a block as transformers builds it, on any device; its classes are restored.
    """
    for module in list(block.modules()):
        if isinstance(module, SeparateExperts):
            take_out(module)
            for matrix in EXPERT_MATRICES:
                _together(module, matrix)
    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear):
            block.get_submodule(name).__class__ = type(module)
        if isinstance(module, Conv1D):
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            closed = Conv1D(linear.out_features, linear.in_features)
            closed.weight = _parameter(linear.weight.data.t())
            closed.bias = _parameter(linear.bias.data)
            block.set_submodule(name, closed)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias.data)
    return linear


def _separate(experts: Any, name: str) -> None:
    stacked, biases = getattr(experts, name).data, getattr(experts, f"{name}_bias", None)
    linears = [
        _linear(
            matrix.t() if experts_are_transposed(experts) else matrix,
            None if biases is None else biases.data[expert],
        )
        for expert, matrix in enumerate(stacked)
    ]
    delattr(experts, name)
    if biases is not None:
        delattr(experts, f"{name}_bias")
    setattr(experts, name, nn.ModuleList(linears))


def _together(experts: Any, name: str) -> None:
    linears = list(getattr(experts, name))
    delattr(experts, name)
    matrices = [linear.weight.data for linear in linears]
    if experts_are_transposed(experts):
        matrices = [matrix.t() for matrix in matrices]
    setattr(experts, name, _parameter(torch.stack(matrices)))
    if experts_have_bias(experts):
        biases = torch.stack([linear.bias.data for linear in linears])
        setattr(experts, f"{name}_bias", _parameter(biases))
