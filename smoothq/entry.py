"""The float weights beside the blocks: how tokens enter them, and the large matrices by rows.

An embedding or a head may be larger than any block, so it is never held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint.stream import Source, check_weight, load_module, unload_module
from .distributed import World
from .errors import CalibrationError, CheckpointError
from .hidden_states import HiddenStates
from .plan import Plan

WORKING_DTYPE = torch.float32  # of a block while it is worked on; folding itself is in float64
ROWS_ELEMENTS = 1 << 22  # of an embedding or a head that are worked on at a time


def enter(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    world: World,
    directory: Path | None = None,
) -> HiddenStates:
    """Take tokens, int64 (samples, length), to the first block, rotated as the plan has it.

    model: the skeleton of the source, left as it is. directory: where hidden states are held in
    files; None holds them in memory. Raises CalibrationError for a token without a row.
    """
    parts = plan.parts
    before = [name for name in (parts.positions, parts.entry_norm) if name]
    for name in before:
        load_module(model.get_submodule(name), name, source, WORKING_DTYPE)
    embedding = model.get_submodule(parts.embedding)
    assert isinstance(embedding, nn.Embedding)
    empty = embedding.weight
    ids = _load_rows(source, model, plan, embedding, tokens)
    states = HiddenStates.enter(model, plan, ids, world, directory)
    embedding.weight = empty
    for name in before:
        unload_module(model.get_submodule(name))
    return states


def float_rows(
    source: Source,
    model: PreTrainedModel,
    module: str,
    fold: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """The rows of an embedding or a head, some at a time, with something folded in."""
    tensor = f"{module}.weight"
    height, width = model.get_submodule(module).get_parameter("weight").shape
    left, count = height, max(1, ROWS_ELEMENTS // width)
    for rows in source.rows(tensor, count):
        check_weight(rows, tensor, (min(left, count), width), source.name)
        left -= len(rows)
        if fold is not None:
            rows = rows.to(WORKING_DTYPE, copy=True)
            fold(rows)
        yield rows
    if left:
        raise CheckpointError(
            f"{source.name}: tensor '{tensor}' has {height - left} rows, the config asks for "
            f"{height}"
        )


def _load_rows(
    source: Source, model: PreTrainedModel, plan: Plan, embedding: nn.Embedding, tokens: Tensor
) -> Tensor:
    """Load the rows of the embedding that tokens need, and no others; returns their new ids."""
    name = plan.parts.embedding
    used: Tensor
    ids: Tensor
    used, ids = tokens.unique(return_inverse=True)
    first, found = 0, list[Tensor]()
    for rows in float_rows(source, model, name):
        here = used[(used >= first) & (used < first + len(rows))] - first
        found.append(rows[here].clone())
        first += len(rows)
    if len(used) and used[-1] >= first:
        raise CalibrationError(f"token {int(used[-1])} is beyond the {first} rows of {name}")
    dtype = WORKING_DTYPE if plan.folds_ends else found[0].dtype
    embedding.weight = nn.Parameter(torch.cat(found).to(dtype), requires_grad=False)
    embedding.padding_idx = None  # it is one of the old ids, and of no use here
    return ids
