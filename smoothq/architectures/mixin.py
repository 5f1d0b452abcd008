"""Mixins for existing modules: their class is replaced in place, by a subclass of it.

Tensors, names and `isinstance` stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Mixin(nn.Module):
    """Base class of mixins.

    The combined class is created at run time and cannot be imported by name; copies and pickles
    create it again from its two base classes, which can.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle stores: both base classes, and the module's state."""
        state: Any = super().__reduce_ex__(max(2, int(protocol)))[2:]
        mixin, stock = type(self).__bases__
        return (_bare, (mixin, stock), *state)


@functools.cache
def _mixed(mixin: Any, stock: Any) -> Any:
    return type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {})


def _bare(mixin: Any, stock: Any) -> Any:
    """An instance of the combined class without state, for pickle to fill."""
    mixed = _mixed(mixin, stock)
    return mixed.__new__(mixed)


def mix_in(module: nn.Module, mixin: type[Mixin]) -> None:
    """Replace a module's class by a subclass of the mixin and of it, in place."""
    both: Any = (mixin, type(module))
    module.__class__ = _mixed(*both)


def take_out(module: nn.Module) -> None:
    """Undo `mix_in`, in place."""
    _, stock = type(module).__bases__
    module.__class__ = stock
