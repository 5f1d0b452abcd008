"""The `weight` attribute of modules that store codes: has a dtype and a device, but no values.

Code of models asks a linear for the dtype or the device of its weight, to cast an input. It gets
those of the float weight; an attempt to read values raises UnsupportedModelError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compat import mark_initialized
from ..errors import UnsupportedModelError

# Names of functions that read no values of a tensor, only its dtype, device or shape.
_ASKS = frozenset(
    # One a line would fill a page.
    """__len__ __hash__ can_cast data_ptr detach dim element_size empty_like full_like get_device
    is_complex is_contiguous is_floating_point is_inference is_pinned is_shared is_signed ndimension
    nelement new_empty new_full new_ones new_tensor new_zeros numel ones_like rand_like randn_like
    result_type size storage_offset stride zeros_like""".split()  # noqa: SIM905
)
# Names of functions that read values of their first tensor only.
_ASKS_OTHERS = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
_VALUES = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that give the values


def values_read(
    function: Any, args: Iterable[Any], kwargs: Mapping[str, Any] | None
) -> Iterator[Tensor]:
    """The tensors among the arguments of a torch function whose values it reads.

    Args:
        function: as `__torch_function__` gets it.
        args: its positional arguments.
        kwargs: its keyword arguments, or None.
    """
    name = getattr(function, "__name__", "")
    if name in _ASKS or (name == "__get__" and function.__self__.__name__ not in _VALUES):
        return
    first, *others = args if args else (None,)
    asked = [first] if name in _ASKS_OTHERS else [first, *others, *(kwargs or {}).values()]
    for leaf in tree_leaves(asked):
        if isinstance(leaf, Tensor):
            yield leaf


@mark_initialized  # what transformers would initialise is loaded
class WeightAnswer(Tensor):
    """A tensor with a float weight's shape, dtype and device, whose values cannot be read."""

    _codes: Tensor

    @classmethod
    def of(cls, codes: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The stand-in for a float weight; in a compiled graph a plain tensor of NaN.

        Args:
            codes: in the stored form; its device counts.
            shape: of the float weight.
            dtype: of the float weight.
        """
        nan = torch.full((), torch.nan, dtype=dtype, device=codes.device).expand(shape)
        if torch.compiler.is_compiling():
            return nan
        answer = nan.as_subclass(cls)
        answer._codes = codes
        return answer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call functions that read no values; moving to a device moves the codes; others raise."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.to, Tensor.cpu, Tensor.cuda) and isinstance(args[0], cls):
                moved: Tensor = func(args[0]._codes, *args[1:], **(kwargs or {}))
                if moved.dtype == args[0]._codes.dtype:
                    return moved  # for code that moves a model's tensors one by one
            if any(isinstance(tensor, cls) for tensor in values_read(func, args, kwargs)):
                raise UnsupportedModelError(
                    f"{getattr(func, '__name__', func)} reads a weight that is held as codes: give "
                    "its linear to keep, so that it stays float, or dequantize the model first"
                )
            if func in (Tensor.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
                return args[0]
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape and dtype."""
        return f"WeightAnswer({tuple(self.shape)}, {self.dtype}, {self.device}, held as codes)"


class HoldsCodes(nn.Module):
    """Base of modules whose buffer `weight` is codes; their own code reads it as `codes`.

    Attributes, set by subclasses:
        weight_shape: of the float weight.
        weight_dtype: of the float weight.
    """

    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype

    def hold(self, codes: Tensor) -> None:
        """Set the codes, in the stored form."""
        self._buffers["weight"] = codes

    @property
    def codes(self) -> Tensor:
        """The codes, in the stored form (`rounding.packing.pack`)."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def weight(self) -> Tensor:
        """A WeightAnswer, for other code; codes that are on the meta device as they are."""
        codes = self._buffers.get("weight")
        if codes is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        if codes.is_meta:
            return mark_initialized(codes)  # also while they stay on the disk
        return WeightAnswer.of(codes, self.weight_shape, self.weight_dtype)
