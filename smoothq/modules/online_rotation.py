"""Hadamard rotations at run time: before down_proj, and at both ends of the residual stream.

The first block rotates its input, whether that comes from the embedding, `inputs_embeds`, soft
prompts or image features; so all of these, and learned positions, stay those of the float model.
Features that a decoder adds between its blocks are rotated as they enter it.
The final norm rotates its input back, so that norm and head too keep their tensors, names and tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..architectures import Parts
from ..architectures.added_features import rotate_added
from ..kernels import QuantizedInput
from ..transforms.hadamard import Hadamard


class OnlineRotation(nn.Module):
    """Computes x R, or x Rᵀ: float (..., K) → the same shape and dtype.

    The factors are non-persistent buffers, constructed by `prepare`; a checkpoint stores none.
    """

    signs: Tensor
    left: Tensor
    right: Tensor
    spectrum: Tensor

    def __init__(self, rotation: Hadamard, transposed: bool = False) -> None:
        """Construct it on the CPU.

        Args:
            rotation: R.
            transposed: compute x Rᵀ.
        """
        super().__init__()
        self.rotation, self.transposed = rotation, transposed
        self.prepare(torch.device("cpu"))

    def prepare(self, device: torch.device) -> None:
        """Construct the factors, int8, on a device, split as runs fastest there."""
        rotation = self.rotation
        order = kernels.left_factor(device, rotation.base, rotation.left * rotation.right)
        left, right = rotation.factors(order)
        factors = {"signs": rotation.signs(), "left": left, "right": right}
        if rotation.keeps_mean:
            factors["spectrum"] = rotation.spectrum()
        for name, factor in factors.items():
            self.register_buffer(name, factor.to(device), persistent=False)
        self._split_for = self.signs.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnlineRotation:
        before = self.signs.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.signs.device != before and not self.signs.is_meta:
            self.prepare(self.signs.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x R (x Rᵀ if transposed), float (..., K), in x's dtype."""
        self._split()
        if self.rotation.keeps_mean:
            return self._back(self._forth(x), self.spectrum)
        return self._back(x, torch.ones_like(self.signs)) if self.transposed else self._forth(x)

    def _split(self) -> None:
        """Construct the factors again if they were moved one by one, as accelerate does it."""
        if self.signs.device != self._split_for:
            self.prepare(self.signs.device)

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
        """Codes of x R, in one operator.

        Args:
            x: float (..., K).
            bits: width of a code.
            group_size: channels of a group in mode `smooth_token`; None for mode `token`.
            clip: scales cover this share of the maximum.
            full_range: in mode `token`, signed scales.
        """
        assert not self.transposed
        assert not self.rotation.keeps_mean
        self._split()
        factors = (self.signs, self.left, self.right)
        return kernels.hadamard_quantize(x, *factors, bits, group_size, clip, full_range)


class RotatedForward:
    """Replaces a module's `forward`: rotates its first input, then calls the class's own.

    It runs after all forward pre-hooks: those that record the input, such as those for
    `output_hidden_states`, see it unrotated, and it is on the module's device by then.
    """

    def __init__(self, module: nn.Module) -> None:
        """module: has an OnlineRotation as `online_rotation`."""
        self.module = module

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output for hidden_states, float (..., K), rotated."""
        module: Any = self.module
        return type(module).forward(module, module.online_rotation(hidden_states), *args, **kwargs)


def rotate_ends(model: nn.Module, parts: Parts, rotation: Hadamard) -> None:
    """Make the first block rotate its input and the final norm rotate its input back, in place.

    Tensors, names and types stay.

    Args:
        model: a causal LM whose blocks are rotated (`transforms.rotation.rotate_residual`).
        parts: its parts.
        rotation: R of the residual stream.
    """
    _rotate_input(model.get_submodule(parts.block_name(0)), OnlineRotation(rotation))
    end = OnlineRotation(rotation, transposed=True)
    assert parts.final_norm is not None, "a rotated stream is rotated back before its final norm"
    _rotate_input(model.get_submodule(parts.final_norm), end)
    decoder = model.get_submodule(parts.decoder)
    features = RotatedFeatures(model.get_submodule(parts.block_name(0)))
    decoder.register_forward_pre_hook(features, with_kwargs=True)


class RotatedFeatures:
    """A forward pre-hook of a decoder that rotates the features it adds between its blocks."""

    def __init__(self, block: nn.Module) -> None:
        """block: the first, which has an OnlineRotation as `online_rotation`."""
        self.block: Any = block

    def __call__(self, _decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The decoder's arguments, with these features rotated."""
        return args, rotate_added(kwargs, self.block.online_rotation)


def _rotate_input(module: nn.Module, rotation: OnlineRotation) -> None:
    module.add_module("online_rotation", rotation)
    module.forward = RotatedForward(module)


def rotated_ends(model: nn.Module) -> Iterator[tuple[nn.Module, OnlineRotation]]:
    """The modules that `rotate_ends` changed, each with its rotation."""
    for module in model.modules():
        rotation = getattr(module, "online_rotation", None)
        if isinstance(rotation, OnlineRotation):
            yield module, rotation


def stop_rotating(model: nn.Module) -> None:
    """Undo `rotate_ends`, in place."""
    module: Any
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, RotatedFeatures):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    for module, _ in list(rotated_ends(model)):
        del module.online_rotation
        if isinstance(vars(module).get("forward"), RotatedForward):
            del module.forward
        else:  # accelerate dispatches the module, and calls by this name what it replaced
            module._old_forward = MethodType(type(module).forward, module)
