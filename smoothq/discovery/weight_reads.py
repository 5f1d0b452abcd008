"""Finds linears whose `weight` a model's own code reads, other than by calling them.

Such a linear cannot be quantized: the code would need the float values. They are found by watching
every torch function that a tiny model of the same wiring calls. Reads of a weight's dtype, device
or shape do not count, for quantized modules answer these (`HoldsCodes`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from ..architectures import Parts
from ..checkpoint.model_class import config_naming_class
from .infer import TOKENS, example
from .stack import kinds_of
from .weight_watch import read_weights

log = logging.getLogger("smoothq")

# config as JSON → (kind of block, or -1 outside of blocks; name of a linear within it)
_reads: dict[str, frozenset[tuple[int, str]]] = {}


def weights_read(model: PreTrainedModel, parts: Parts) -> Callable[[str], bool]:
    """A function: full name of a linear → whether the model's code reads its values.

    If no tiny model of the wiring runs, a warning is logged and the function returns False; a read
    then raises an error when the quantized model runs.

    Args:
        model: may be on the meta device; it is not changed.
        parts: its parts.
    """
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    kinds = kinds_of(model)
    key = config_naming_class(model).to_json_string(use_diff=False)
    if key not in _reads:
        _reads[key] = _watched(model, parts, kinds)
    read, pattern = _reads[key], re.compile(rf"{re.escape(parts.layers)}\.(\d+)\.(.*)")

    def is_read(name: str) -> bool:
        within = pattern.fullmatch(name)
        kind, place = (-1, name) if within is None else (kinds[int(within[1])], within[2])
        return (kind, _counted(place)) in read

    return is_read


def _counted(name: str) -> str:
    """A name with `*` for its numbers: a tiny model has fewer experts."""
    return re.sub(r"\d+", "*", name)


def _watched(model: PreTrainedModel, parts: Parts, kinds: list[int]) -> frozenset[tuple[int, str]]:
    """The linears that are read: kind of their block (-1 outside of blocks), and name within it."""
    try:
        names = read_weights(example(config_naming_class(model), kinds), TOKENS)
    except Exception as error:  # the model's own code may raise anything
        log.warning(
            "%s: no tiny model of it runs (%s), so reads of its linears' weights cannot be watched",
            model.config.model_type,
            type(error).__name__,
        )
        return frozenset()
    reads = set()
    for name in names:
        index, _, place = name.removeprefix(f"{parts.layers}.").partition(".")
        inside = name.startswith(f"{parts.layers}.")
        reads.add((kinds[int(index)], _counted(place)) if inside else (-1, _counted(name)))
    return frozenset(reads)
