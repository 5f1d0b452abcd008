"""Which linears' weights a model's code reads itself, beside calling the linears.

Such a linear cannot be replaced by codes: its values are used where no forward of its own is
called. They are found by watching every torch function that a tiny model of the same wiring calls;
a read of a weight's dtype or device is no read of its values, and is answered (`HoldsCodes`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from ..architectures import Parts
from .infer import TOKENS, example, kinds_of
from .weight_watch import read_weights

log = logging.getLogger("smoothq")

# config as JSON → (kind of block, or -1 outside of blocks; name of a linear within it)
_reads: dict[str, frozenset[tuple[int, str]]] = {}


def weights_read(model: PreTrainedModel, parts: Parts) -> Callable[[str], bool]:
    """Whether the code of a model reads the values of a linear, given by its full name.

    model: may be on the meta device, and is left as it is. Of a wiring that no tiny model can be
    made of nothing is known: then a warning says so, and a read ends the run that meets it.
    """
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    kinds = kinds_of(layers)
    key = model.config.to_json_string(use_diff=False)
    if key not in _reads:
        _reads[key] = _watched(model, parts, kinds)
    read, pattern = _reads[key], re.compile(rf"{re.escape(parts.layers)}\.(\d+)\.(.*)")

    def is_read(name: str) -> bool:
        within = pattern.fullmatch(name)
        kind, place = (-1, name) if within is None else (kinds[int(within[1])], within[2])
        return (kind, _counted(place)) in read

    return is_read


def _counted(name: str) -> str:
    """A name without its numbers: a tiny model has fewer experts."""
    return re.sub(r"\d+", "*", name)


def _watched(model: PreTrainedModel, parts: Parts, kinds: list[int]) -> frozenset[tuple[int, str]]:
    """What is read: the kind of the block, -1 outside of them, and the linear's name there."""
    try:
        names = read_weights(example(model.config, kinds), TOKENS)
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
