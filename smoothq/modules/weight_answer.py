"""What `module.weight` answers where the weight is held as codes: its dtype and device, no values.

Stock code asks a linear for the dtype or the device of its weight, to cast what it hands over, and
gets those of the float weight that the codes stand for. Its values are not there to be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compat import mark_initialized
from ..errors import UnsupportedModelError

# Functions that ask a tensor for anything but its values, by name.
_ASKS = frozenset(
    # One a line would fill a page.
    """__len__ __hash__ can_cast data_ptr detach dim element_size empty_like full_like get_device
    is_complex is_contiguous is_floating_point is_inference is_pinned is_shared is_signed ndimension
    nelement new_empty new_full new_ones new_tensor new_zeros numel ones_like rand_like randn_like
    result_type size storage_offset stride zeros_like""".split()  # noqa: SIM905
)
# Those that ask every tensor but the first for its dtype, device or shape alone.
_ASKS_OTHERS = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
_VALUES = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are the values again


def values_read(
    function: Any, args: Iterable[Any], kwargs: Mapping[str, Any] | None
) -> Iterator[Tensor]:
    """The tensors whose values a torch function is called for: not those asked for their dtype."""
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
    """A tensor of a float weight's shape, dtype and device that refuses to be read."""

    _codes: Tensor

    @classmethod
    def of(cls, codes: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The answer for codes in the stored form. Inside of a compiled graph it is all NaN."""
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
        """Call what asks for no value; move as the codes do; refuse the rest."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.to, Tensor.cpu, Tensor.cuda) and isinstance(args[0], cls):
                moved: Tensor = func(args[0]._codes, *args[1:], **(kwargs or {}))
                if moved.dtype == args[0]._codes.dtype:
                    return moved  # who moves a model's tensors one by one puts this in its place
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
    """A module whose buffer `weight` is codes, which only its own code reads, as `codes`.

    A subclass says what float weight they stand for: `weight_shape`, `weight_dtype`.
    """

    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype

    def hold(self, codes: Tensor) -> None:
        """Take over codes in the stored form."""
        self._buffers["weight"] = codes

    @property
    def codes(self) -> Tensor:
        """The codes as they are stored."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def weight(self) -> Tensor:
        """The answer for all other code; the codes themselves while they are still to be loaded."""
        codes = self._buffers.get("weight")
        if codes is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        if codes.is_meta:
            return codes
        return WeightAnswer.of(codes, self.weight_shape, self.weight_dtype)
