"""Errors from below the command line, in the command line's words."""

from __future__ import annotations

import re

_SWITCH = re.compile(r"(?<![\w.])([a-z_]+)=(True|False)\b")
_CHOICE = re.compile(r"\b(method|effort)=(\w+)")
_FIELD = re.compile(r"\b([a-z_]+\.[a-z_]+=\w+)")


def in_flags(message: str) -> str:
    """A message with the arguments and fields that it names written as flags.

    Errors name what Python accepts, such as `overwrite=True`, `method=rs` or `activations.bits=16`;
    the flags are `--overwrite`, `--method rs` and `--set activations.bits=16`.
    """
    message = _SWITCH.sub(lambda at: _switch(at[1], at[2] == "True"), message)
    message = _CHOICE.sub(r"--\1 \2", message)
    return _FIELD.sub(r"--set \1", message)


def _switch(name: str, on: bool) -> str:
    return f"--{'' if on else 'no-'}{name.replace('_', '-')}"
