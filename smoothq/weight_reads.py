"""Which linears' weights a model's code reads itself, beside calling the linears.

Such a linear cannot be replaced by codes: its values are used where no forward of its own is
called. They are found by watching every torch function that a tiny model of the same wiring calls;
a read of a weight's dtype or device is no read of its values, and is answered (`HoldsCodes`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import proof
from .architectures import Parts
from .inference import TOKENS, example, kinds_of
from .modules.weight_answer import values_read

log = logging.getLogger("smoothq")

_PLAIN = (nn.Linear, Conv1D)  # whose forward is a product with the weight and no more
_TOKENS_MADE = 3  # after a prompt: what a model reads with a cache may be something else

_found: dict[str, frozenset[tuple[int, str]]] = {}


def weights_read(model: PreTrainedModel, parts: Parts) -> Callable[[str], bool]:
    """Whether the code of a model reads the values of a linear, given by its full name.

    model: may be on the meta device, and is left as it is. Of a wiring that no tiny model can be
    made of nothing is known: then a warning says so, and a read ends the run that meets it.
    """
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    kinds = kinds_of(layers)
    key = model.config.to_json_string(use_diff=False)
    if key not in _found:
        _found[key] = _watched(model, parts, kinds)
    read, pattern = _found[key], re.compile(rf"{re.escape(parts.layers)}\.(\d+)\.(.*)")

    def is_read(name: str) -> bool:
        within = pattern.fullmatch(name)
        kind, place = (-1, name) if within is None else (kinds[int(within[1])], within[2])
        return (kind, _counted(place)) in read

    return is_read


def _counted(name: str) -> str:
    """A name without its numbers: a tiny model has fewer experts."""
    return re.sub(r"\d+", "*", name)


@torch.no_grad()
def _watched(model: PreTrainedModel, parts: Parts, kinds: list[int]) -> frozenset[tuple[int, str]]:
    """What is read: the kind of the block, -1 outside of them, and the linear's name there."""
    try:
        tiny = example(model.config, kinds)
        watch = WeightWatch(tiny)
        with proof.InFloat64(), watch:
            tiny(TOKENS, use_cache=False)
            with suppress(Exception):  # not every model generates from these tokens
                tiny.generate(
                    TOKENS, max_new_tokens=_TOKENS_MADE, do_sample=False, eos_token_id=None
                )
    except Exception as error:  # the model's own code may raise anything
        log.warning(
            "%s: no tiny model of it runs (%s), so reads of its linears' weights cannot be watched",
            model.config.model_type,
            type(error).__name__,
        )
        return frozenset()
    found = set()
    for name in watch.read:
        index, _, place = name.removeprefix(f"{parts.layers}.").partition(".")
        inside = name.startswith(f"{parts.layers}.")
        found.add((kinds[int(index)], _counted(place)) if inside else (-1, _counted(name)))
    return frozenset(found)


class WeightWatch(TorchFunctionMode):
    """While it is entered, `read` collects the names of linears whose values other code reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._running: list[str] = []
        self._owners: dict[int, set[str]] = {}
        self._hooks: list[Any] = []
        self._linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (*_PLAIN, nn.Embedding))
        }
        for name, module in self._linears.items():
            self._owners.setdefault(_storage(module.weight), set()).add(name)

    def __enter__(self) -> WeightWatch:
        """Begin to watch."""
        for name, module in self._linears.items():
            self._hooks += [
                module.register_forward_pre_hook(self._begins(name)),
                module.register_forward_hook(self._ends(name), always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End it."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note whose weight `func` reads, and call it."""
        for tensor in values_read(func, args, kwargs):
            owners = self._owners.get(_storage(tensor), set())
            if not owners & set(self._running):
                self.read |= owners
        return func(*args, **(kwargs or {}))

    def _begins(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(name)

    def _ends(self, name: str) -> Callable[..., None]:
        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A class of its own may do something else with its weight than multiply by it.
            own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
            if own and not _is_product(module, args, output):
                self.read.add(name)
            self._running.remove(name)

        return end


def _storage(tensor: Tensor) -> int:
    """The same for all views of one weight."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _is_product(linear: Any, args: tuple[Any, ...], output: Any) -> bool:
    """Whether what a linear put out is its input's product with its weight, plus its bias."""
    if not (isinstance(output, Tensor) and args and isinstance(args[0], Tensor)):
        return False
    product = nn.functional.linear(args[0], linear.weight, linear.bias)
    return output.shape == product.shape and torch.allclose(output, product)
