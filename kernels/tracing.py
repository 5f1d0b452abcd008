"""Detects tracing (torch.compile, fake tensors, dispatch modes), and guards against autograd.

Backends compute results outside of both: from the addresses of tensors, in C++ and in Triton.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced(x: Tensor) -> bool:
    """Whether operations on a tensor are traced rather than run.

    True under torch.compile or a dispatch mode, and for meta tensors and subclasses of Tensor, such
    as fake tensors.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or is_in_torch_dispatch_mode()
    )


def needs_gradient(operands: tuple[object, ...]) -> bool:
    """Whether autograd is on and a tensor among the operands asks for a gradient."""
    if torch.is_grad_enabled():
        for operand in operands:  # a generator would take longer than a product
            if isinstance(operand, Tensor) and operand.requires_grad:
                return True
    return False


def refuse_gradient(context: Any, *gradients: Tensor) -> None:
    """Raises RuntimeError: what stands for the gradient of an operator."""
    raise RuntimeError(
        "smoothq's integer layers have no gradient; train the float model, or "
        "`dequantize()` this one first"
    )


class _Undifferentiable(torch.autograd.Function):
    """Passes a result on as a function of x whose backward raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor) -> Tensor:
        """A view of `result`."""
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raises RuntimeError."""
        refuse_gradient(ctx, *gradients)


def tied(result: Tensor, x: Tensor) -> Tensor:
    """The result of x, tied to it in the autograd graph: a backward through it raises RuntimeError.

    Without the tie a gradient would silently stop at the result.

    Args:
        result: computed from x outside of autograd.
        x: what the gradient would be of.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Undifferentiable.apply(x, result))  # type: ignore[no-untyped-call]
    return result
