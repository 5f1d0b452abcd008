"""Hadamard rotations that run with the model: before down_proj, and at the residual stream's ends.

What enters the first block is rotated there, whatever way it came: from the embedding, as
`inputs_embeds`, as soft prompts or image features. So all of these, and learned positions, are the
float model's. An untied head takes in the final norm's weight and undoes the rotation. With a tied
one that would make two matrices of one: instead what leaves the last block is rotated back before
the final norm; embedding, norm and head keep their tensors, names and tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
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


class RotatedForward:
    """A module's `forward` for an input that is rotated first: its own, called with x R or x Rᵀ.

    Not a hook, so that hooks of others that record what the module is given, such as those behind
    `output_hidden_states`, see it unrotated, and it is on the module's device when it is rotated.
    """

    def __init__(self, module: nn.Module) -> None:
        """module: holds an `online_rotation`."""
        self.module = module

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own output for hidden_states (..., K), rotated."""
        module: Any = self.module
        return type(module).forward(module, module.online_rotation(hidden_states), *args, **kwargs)


def rotate_ends(model: nn.Module, parts: Parts, rotation: Hadamard) -> None:
    """Make the first block rotate what it is given and the final norm rotate it back, in place.

    Tensors, names and types stay.
    """
    _rotate_input(model.get_submodule(parts.first_block), OnlineRotation(rotation))
    end = OnlineRotation(rotation, transposed=True)
    _rotate_input(model.get_submodule(parts.final_norm), end)


def _rotate_input(module: nn.Module, rotation: OnlineRotation) -> None:
    module.add_module("online_rotation", rotation)
    module.forward = RotatedForward(module)


def rotated_ends(model: nn.Module) -> Iterator[tuple[nn.Module, OnlineRotation]]:
    """The modules whose input `rotate_ends` made rotate, each with its rotation."""
    for module in model.modules():
        rotation = getattr(module, "online_rotation", None)
        if isinstance(rotation, OnlineRotation):
            yield module, rotation


def stop_rotating(model: nn.Module) -> None:
    """Undo `rotate_ends`, in place."""
    module: Any
    for module, _ in list(rotated_ends(model)):
        del module.online_rotation
        if isinstance(vars(module).get("forward"), RotatedForward):
            del module.forward
        else:  # accelerate dispatches the module, and calls by this name what it replaced
            module._old_forward = MethodType(type(module).forward, module)
