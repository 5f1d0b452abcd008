"""What must not be passed by: a compiler or a mode that looks on, and autograd."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced(x: Tensor) -> bool:
    """Whether a compiler, fake tensors or a dispatch mode follow what happens to a tensor."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or is_in_torch_dispatch_mode()
    )


class _Undifferentiable(torch.autograd.Function):
    """The identity, whose gradient is refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor) -> Tensor:
        """`result`, as a function of x."""
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raises RuntimeError."""
        raise RuntimeError(
            "smoothq's integer layers have no gradient; train the float model, or "
            "`dequantize()` this one first"
        )


def tied(result: Tensor, x: Tensor) -> Tensor:
    """A result that was computed from x outside of autograd: its gradient is refused, not lost."""
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Undifferentiable.apply(x, result))  # type: ignore[no-untyped-call]
    return result
