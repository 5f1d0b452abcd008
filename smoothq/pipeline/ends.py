"""A float model by its parts: what leads to the blocks, one block, what stands behind them.

An embedding or a head may be larger than any block, so those to be stored come by rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.graph import all_finite, is_tied
from ..architectures.linearize import linearize_block
from ..checkpoint.source import (
    Source,
    check_weight,
    load_module,
    skeleton,
    unload_module,
)
from ..errors import CalibrationError, CheckpointError, NumericsError
from ..modules import OnlineRotation, QuantizedEmbedding, QuantizedLinear
from ..modules.quantized_embedding import row_grid
from ..plan.install import install_ends
from ..plan.plan import BlockPlan, Plan
from ..rounding.grid import QuantizedWeight
from ..rounding.rtn import round_to_nearest
from ..runtime.distributed import World
from ..transforms.norm_fusion import fuse_norms
from ..transforms.rotation import rotate_residual
from .hidden_states import HiddenStates

WORKING_DTYPE = torch.float32  # of a block while it is worked on; folding itself is in float64
ROWS_ELEMENTS = 1 << 22  # of an embedding or a head that are worked on at a time


@dataclass(frozen=True)
class Block:
    """The block at hand: its module, its name and index in the model, and its plan."""

    module: nn.Module
    name: str
    index: int
    plan: BlockPlan


def embed_tokens(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    world: World,
    directory: Path | None = None,
    *,
    as_stored: bool = False,
    rotate: Callable[[Tensor], Tensor] | None = None,
) -> HiddenStates:
    """Take micro-batches, int64 (sequences, length), to the first block, rotated as planned.

    model: the skeleton of the source, left as it is. directory: where hidden states are held in
    files; None holds them in memory. as_stored: with the embedding's rows in 8 bits, where the plan
    stores them so. rotate: what rotates them; None does it in float64.
    Raises CalibrationError for a token without a row.
    """
    parts = plan.parts
    before = [name for name in (parts.positions, parts.entry_norm) if name]
    for name in before:
        load_module(model.get_submodule(name), name, source, WORKING_DTYPE)
    embedding = model.get_submodule(parts.embedding)
    assert isinstance(embedding, nn.Embedding)
    empty = embedding.weight
    ids = _load_rows(source, model, plan, embedding, batches, as_stored)
    states = HiddenStates.embed_tokens(model, plan, ids, world, directory, rotate)
    embedding.weight = empty
    for name in before:
        unload_module(model.get_submodule(name))
    return states


def load_block(
    source: Source, model: PreTrainedModel, plan: Plan, index: int, device: torch.device
) -> Block:
    """One block of a skeleton brought to life: opened, in float32, rotated as its plan has it.

    The skeleton's own block stays as it is.
    """
    name, block_plan = f"{plan.parts.layers}.{index}", plan.blocks[index]
    module = copy.deepcopy(model.get_submodule(name))
    load_module(module, name, source, WORKING_DTYPE)
    linearize_block(module)
    module.to(device)
    if plan.residual_rotation is not None:
        fuse_norms(module, block_plan.graph)
        rotate_residual(module, block_plan.graph, plan.residual_rotation)
    return Block(module, name, index, block_plan)


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


def stored_rows(source: Source, name: str, finite: bool = False) -> Iterator[Tensor]:
    """A tensor of a source as it is stored, a large one in stretches of its rows.

    finite: raise NumericsError for NaN or Inf.
    """
    spec = source.specs.get(name) or source.extras[name]
    height, *others = spec.shape or (1,)
    width = math.prod(others)
    stretches: Iterator[Tensor]
    if height * width <= ROWS_ELEMENTS or name in source.extras:
        stretches = (tensor for _, tensor in source.tensors([name]))
    else:
        stretches = source.rows(name, max(1, ROWS_ELEMENTS // max(1, width)))
    for rows in stretches:
        if finite and not all_finite(rows):
            raise NumericsError(f"{source.name}: tensor '{name}' holds NaN or Inf")
        yield rows


def coded_rows(source: Source, name: str) -> Iterator[QuantizedWeight]:
    """An embedding or a head in 8 bits with a scale a row, in stretches of its rows.

    Raises NumericsError for NaN or Inf.
    """
    return map(_coded, stored_rows(source, name, finite=True))


def _coded(rows: Tensor) -> QuantizedWeight:
    return round_to_nearest(rows, row_grid(rows.shape[1]))


class ModelTail:
    """What stands behind the blocks, final norm and head, run by the model's own code.

    A model without its blocks is its own end, once the final norm is handed its input. The head is
    held whole, in float32.
    """

    def __init__(
        self, source: Source, plan: Plan, device: torch.device, as_stored: bool = False
    ) -> None:
        """Read the last norm and the head.

        as_stored: as the loaded model does it: the head in 8 bits where the plan stores it so, the
        rotation by its own operator.
        """
        self._model, self._plan, self._as_stored = skeleton(source), plan, as_stored
        model, parts = self._model, plan.parts
        last = parts.embedding if is_tied(model) else parts.head
        for name in (parts.positions, parts.entry_norm, parts.final_norm, last):
            if name is not None:
                load_module(model.get_submodule(name), name, source, WORKING_DTYPE)
        if is_tied(model):
            head = model.get_submodule(parts.head)
            own = [f"{parts.head}.{name}" for name in head.state_dict() if name != "weight"]
            for name, tensor in source.tensors(own):  # a bias: it is tied to nothing
                bias = nn.Parameter(tensor.to(WORKING_DTYPE, copy=True), requires_grad=False)
                head.register_parameter(name.rpartition(".")[2], bias)
            head.register_parameter("weight", model.get_submodule(last).get_parameter("weight"))
        if as_stored and plan.tables:
            self._quantize_head(last)
        model.set_submodule(parts.layers, nn.ModuleList())
        for name in (parts.positions, parts.entry_norm, parts.final_norm, last, parts.head):
            if name is not None:
                model.get_submodule(name).to(device)

    def _quantize_head(self, name: str) -> None:
        """Codes in the place of the matrix that the head multiplies by. name: where it lies."""
        model, parts = self._model, self._plan.parts
        weight = model.get_submodule(name).get_parameter("weight")
        bias = getattr(model.get_submodule(parts.head), "bias", None)
        install_ends(model, self._plan)
        quantized = model.get_submodule(name)
        if isinstance(quantized, QuantizedEmbedding):
            quantized.set_weight(_coded(weight))
        elif isinstance(quantized, QuantizedLinear):
            quantized.set_weight(_coded(weight), bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of what leaves the last block, rotated as the plan has it: float32 (…, vocabulary).

        hidden: float32 (sequences, tokens, hidden_size).
        """
        rotation = self._plan.residual_rotation
        end = hidden
        if rotation is not None and self._as_stored:
            end = OnlineRotation(rotation, transposed=True).to(hidden.device)(hidden)
        elif rotation is not None:
            end = rotation.apply_transposed(hidden)
        final_norm = self._model.get_submodule(self._plan.parts.final_norm)
        hook = final_norm.register_forward_pre_hook(lambda _, args: (end, *args[1:]))
        try:
            logits: Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        finally:
            hook.remove()
        return logits.float()


def _load_rows(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    embedding: nn.Embedding,
    tokens: Sequence[Tensor],
    as_stored: bool,
) -> list[Tensor]:
    """Load the rows of the embedding that tokens need, and no others; returns their new ids."""
    name = plan.parts.embedding
    used: Tensor
    ids: Tensor
    used, ids = torch.cat([batch.flatten() for batch in tokens]).unique(return_inverse=True)
    if len(used) and used[0] < 0:
        raise CalibrationError(f"token {int(used[0])} is no row of {name}: ids begin with 0")
    first, found = 0, list[Tensor]()
    for rows in float_rows(source, model, name):
        here = used[(used >= first) & (used < first + len(rows))] - first
        found.append(rows[here].clone())
        first += len(rows)
    if len(used) and used[-1] >= first:
        raise CalibrationError(f"token {int(used[-1])} is beyond the {first} rows of {name}")
    # In the working dtype: an embedding may round its product with a factor to its own (Gemma).
    weight = torch.cat(found).to(WORKING_DTYPE)
    if as_stored and plan.tables:
        weight = _coded(weight).dequantize(WORKING_DTYPE)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.padding_idx = None  # it is one of the old ids, and of no use here
    split = ids.split([batch.numel() for batch in tokens])
    return [each.view_as(batch) for each, batch in zip(split, tokens, strict=True)]
