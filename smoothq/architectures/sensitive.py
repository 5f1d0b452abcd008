"""Linears that lose more than they save in few bits: the field's rules, as data.

Each is small and steers a large part of its block: a gate of one number a token, the decay and step
size of a recurrent state, the scores by which a sparse attention chooses tokens. Released FP8, INT4
and NVFP4 checkpoints of these families leave them in float.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

# Pattern of full names → what the linear does.
FLOAT_BY_DEFAULT = {
    "*.shared_expert_gate": "gates a shared expert with one number a token",
    "*.linear_attn.in_proj_a": "computes the decay of a recurrent state",
    "*.linear_attn.in_proj_b": "computes the step size of a recurrent state",
    "*.linear_attn.in_proj_ba": "computes decay and step size of a recurrent state",
    "*.indexer.weights_proj": "weighs the heads that choose a sparse attention's tokens",
}


def float_by_default(linears: Iterable[str]) -> dict[str, str]:
    """The patterns of `FLOAT_BY_DEFAULT` that match some linears, with what these do.

    Args:
        linears: full names.
    """
    names = list(linears)
    matching = {pattern for pattern in FLOAT_BY_DEFAULT if fnmatch.filter(names, pattern)}
    return {pattern: does for pattern, does in FLOAT_BY_DEFAULT.items() if pattern in matching}
