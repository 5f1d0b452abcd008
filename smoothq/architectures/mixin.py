"""Behaviour put in front of a stock module's own class, in place: tensors, names and types stay."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Mixin(nn.Module):
    """Base of what is mixed into a stock module.

    The class that comes of it is made while the program runs, so that no module has its name; its
    two parents are importable, and by them a copy or a pickle finds it again.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module's own, but for how the class is found."""
        state: Any = super().__reduce_ex__(max(2, int(protocol)))[2:]
        mixin, stock = type(self).__bases__
        return (_bare, (mixin, stock), *state)


@functools.cache
def _mixed(mixin: Any, stock: Any) -> Any:
    return type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {})


def _bare(mixin: Any, stock: Any) -> Any:
    """A module of the mixed class without any state."""
    mixed = _mixed(mixin, stock)
    return mixed.__new__(mixed)


def mix_in(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin in front of a module's class, in place."""
    both: Any = (mixin, type(module))
    module.__class__ = _mixed(*both)


def take_out(module: nn.Module) -> None:
    """Undo `mix_in`."""
    _, stock = type(module).__bases__
    module.__class__ = stock
