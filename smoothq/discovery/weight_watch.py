"""Detects, while a model runs, which linears have their weight read by other code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..architectures.graph import final_output
from ..modules.weight_answer import values_read
from . import equivalence as equivalence

_WATCHED = (nn.Linear, Conv1D, nn.Embedding)
_TOKENS_MADE = 3  # generated after a prompt: with a cache a model may run other code


def read_weights(model: Any, tokens: Tensor) -> frozenset[str]:
    """The names of linears and embeddings whose values a model's own code reads.

    Args:
        model: any class of model around a decoder, in float64.
        tokens: int64 (batch, length), the prompt of the forward and of a short generation.
    """
    watch = WeightWatch(model)
    with torch.no_grad(), equivalence.InFloat64(), watch:
        final_output(model, tokens, use_cache=False)
        with suppress(Exception):  # not every model generates from these tokens
            model.generate(tokens, max_new_tokens=_TOKENS_MADE, do_sample=False, eos_token_id=None)
    return frozenset(watch.read)


class WeightWatch(TorchFunctionMode):
    """A context that records linears and embeddings whose values other code reads.

    Attributes:
        read: their full names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._running: list[str] = []
        self._owners: dict[int, set[str]] = {}
        self._hooks: list[Any] = []
        self._linears = {
            name: module for name, module in model.named_modules() if isinstance(module, _WATCHED)
        }
        for name, module in self._linears.items():
            self._owners.setdefault(_storage(module.weight), set()).add(name)

    def __enter__(self) -> WeightWatch:
        """Start recording."""
        for name, module in self._linears.items():
            self._hooks += [
                module.register_forward_pre_hook(self._begins(name)),
                module.register_forward_hook(self._ends(name), always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record the owners of weights that `func` reads, and call it."""
        for tensor in values_read(func, args, kwargs):
            owners = self._owners.get(_storage(tensor), set())
            if not owners & set(self._running):
                self.read |= owners
        return func(*args, **(kwargs or {}))

    def _begins(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(name)

    def _ends(self, name: str) -> Callable[..., None]:
        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A subclass may do something else with its weight than multiply by it.
            overrides = isinstance(module, nn.Linear) and (
                type(module).forward is not nn.Linear.forward
            )
            if overrides and not _is_product(module, args, output):
                self.read.add(name)
            self._running.remove(name)

        return end


def _storage(tensor: Tensor) -> int:
    """The storage of a tensor: equal for all views of one weight."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _is_product(linear: Any, args: tuple[Any, ...], output: Any) -> bool:
    """Whether a linear's output is its input times its weight, plus its bias."""
    if not (isinstance(output, Tensor) and args and isinstance(args[0], Tensor)):
        return False
    product = nn.functional.linear(args[0], linear.weight, linear.bias)
    return output.shape == product.shape and torch.allclose(output, product)
