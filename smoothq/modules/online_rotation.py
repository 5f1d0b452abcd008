"""Hadamard rotations that run with the model: before down_proj, and where embeddings are tied.

With tied embeddings, folding R into the embedding and the final norm's weight into the head would
make two matrices of one. Instead the embedding's output is rotated, and rotated back before the
final norm; embedding, norm and head keep their tensors, names and tie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..architectures import Parts
from ..kernels import QuantizedInput
from ..transforms.hadamard import Hadamard


class OnlineRotation(nn.Module):
    """x R, or x Rᵀ: float (..., K) → the same shape and dtype.

    Its factors are constructed by `prepare`; nothing of them is ever stored.
    """

    signs: Tensor
    left: Tensor
    right: Tensor
    spectrum: Tensor

    def __init__(self, rotation: Hadamard, transposed: bool = False) -> None:
        super().__init__()
        self.rotation, self.transposed = rotation, transposed
        self.prepare(torch.device("cpu"))

    def prepare(self, device: torch.device) -> None:
        """Construct the factors, int8, as they run fastest on a device."""
        rotation = self.rotation
        order = kernels.left_factor(device, rotation.base, rotation.left * rotation.right)
        left, right = rotation.factors(order)
        factors = {"signs": rotation.signs(), "left": left, "right": right}
        if rotation.keeps_mean:
            factors["spectrum"] = rotation.spectrum()
        for name, factor in factors.items():
            self.register_buffer(name, factor.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnlineRotation:
        before = self.signs.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.signs.device != before and not self.signs.is_meta:
            self.prepare(self.signs.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Rotate float (..., K)."""
        if self.rotation.keeps_mean:
            return self._back(self._forth(x), self.spectrum)
        return self._back(x, torch.ones_like(self.signs)) if self.transposed else self._forth(x)

    def _forth(self, x: Tensor) -> Tensor:
        """x · diag(signs) · (H_left ⊗ H_right) / √(left · right)."""
        rotated: Tensor = kernels.hadamard(x, self.signs, self.left, self.right)
        return rotated

    def _back(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """x · diag(spectrum) · (H_left ⊗ H_right)ᵀ · diag(signs) / √(left · right)."""
        rotated: Tensor = kernels.hadamard(x, spectrum, self.left.t(), self.right.t())
        return rotated * self.signs

    def quantize(
        self, x: Tensor, bits: int, group_size: int | None, clip: float, full_range: bool
    ) -> QuantizedInput:
        """x R as codes, float (..., K): one scale a token, or a multiplier a group of a token."""
        assert not self.transposed
        assert not self.rotation.keeps_mean
        factors = (self.signs, self.left, self.right)
        return kernels.hadamard_quantize(x, *factors, bits, group_size, clip, full_range)


class RotatesOutput(nn.Module):
    """Mixed into what enters the residual stream: its output is multiplied by R."""

    online_rotation: OnlineRotation

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output, (..., K), times R."""
        return self.online_rotation(super().forward(*args, **kwargs))  # type: ignore[no-any-return]


class RotatesInput(nn.Module):
    """Mixed into a norm: its input is multiplied by Rᵀ first."""

    online_rotation: OnlineRotation

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The norm's own output for x Rᵀ, (..., K)."""
        return super().forward(self.online_rotation(x), *args, **kwargs)  # type: ignore[no-any-return]


def rotate_ends(model: nn.Module, parts: Parts, rotation: Hadamard) -> None:
    """Make what enters the stack of blocks rotate and the final norm rotate back, in place.

    Tensors, names and types stay.
    """
    for name, mixin in ((parts.entry, RotatesOutput), (parts.final_norm, RotatesInput)):
        module = model.get_submodule(name)
        stock = type(module)
        module.__class__ = type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {})
        module.online_rotation = OnlineRotation(rotation, transposed=mixin is RotatesInput)


def stop_rotating(module: nn.Module) -> None:
    """Undo `rotate_ends` for one of the two."""
    if isinstance(module, RotatesOutput | RotatesInput):
        del module.online_rotation
        module.__class__ = type(module).__mro__[2]
