"""Linears told by the names of stored tensors, for models whose class nobody knows.

The names are those that the families of transformers share. What is no linear of a decoder's blocks
by its name stays in float: embeddings, heads, norms, routers and gates, convolutions, towers.
"""

from __future__ import annotations

from collections.abc import Container
from fnmatch import fnmatchcase

from .sensitive import FLOAT_BY_DEFAULT

# Patterns of one part of a dotted name; a module below such a part is no linear of a block either.
FLOAT_PARTS = (
    *("*embed*", "*_emb", "wte", "wpe", "*position*", "*relative*bias*"),  # tables
    *("*head", "*heads", "score", "classifier"),
    *("*norm*", "ln_*"),
    *("*router*", "gate", "*_gate"),  # not gate_proj
    "*conv*",
    "dt_proj",  # the step size of a recurrent state; Mamba's code reads its weight
    *("*vision*", "*visual*", "*image*", "*video*", "*audio*", "*speech*", "*patch*"),
    *("*projector*", "aligner*", "connector*", "merger*", "resampler*", "perceiver*"),
)
FLOAT_NAMES = ("output", "model.output")  # whole names: a head, as in InternLM 2
# Last parts of the names of linears that read one tensor, and that servers hold as one matrix.
MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)


def stays_float(module: str) -> bool:
    """Whether a module, by its full name, has no matrix that is quantized.

    Args:
        module: full name, without `.weight`.
    """
    if module in FLOAT_NAMES or any(fnmatchcase(module, pattern) for pattern in FLOAT_BY_DEFAULT):
        return True
    parts = module.lower().split(".")
    return any(fnmatchcase(part, pattern) for part in parts for pattern in FLOAT_PARTS)


def merged_with(module: str, among: Container[str]) -> tuple[str, ...]:
    """The linears that servers hold as one matrix with a linear, itself included, by full names.

    Args:
        module: full name of a linear.
        among: full names of all linears.
    """
    parent, dot, leaf = module.rpartition(".")
    group = next((group for group in MERGED if leaf in group), (leaf,))
    return tuple(name for other in group if (name := f"{parent}{dot}{other}") in among)
