"""A float model part by part: embedding, one block, and final norm with head.

An embedding or a head may be larger than any block, so the functions that read them for storing
yield chunks of rows.
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

from ..architectures.graph import all_finite
from ..architectures.linearize import linearize_block
from ..checkpoint.source import Source, check_weight, load_module, unload_module
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

WORKING_DTYPE = torch.float32  # of a loaded block; folding itself is computed in float64
ROWS_ELEMENTS = 1 << 22  # largest number of elements in a chunk of rows


@dataclass(frozen=True)
class Block:
    """A decoder block loaded from the source.

    Attributes:
        module: the block in float32, linearized.
        name: its full name in the model.
        index: its number in the model.
        plan: how it is quantized.
    """

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
    """The hidden states that enter the first block, with the plan's residual rotation applied.

    Args:
        source: the float checkpoint.
        model: the float model on the meta device; unchanged on return.
        plan: its plan.
        batches: token ids in micro-batches, int64 (sequences, length).
        world: the ranks of the run.
        directory: where to store the hidden states in a file; None keeps them in memory.
        as_stored: whether to round the embedding to 8 bits if the plan stores it so.
        rotate: replaces the plan's residual rotation, which is computed in float64.

    Raises:
        CalibrationError: a token id is negative or not below the number of embedding rows.
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
    """Load one block: linearized, in float32, with the plan's residual rotation folded in.

    Args:
        source: the float checkpoint.
        model: the float model on the meta device; its block is copied.
        plan: its plan.
        index: the block's number.
        device: where to load the block.
    """
    name, block_plan = plan.parts.block_name(index), plan.blocks[index]
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
    """Yield the rows of an embedding or a head in chunks, each float (rows, columns).

    Args:
        source: the float checkpoint.
        model: the float model on the meta device.
        module: the full name of the embedding or head.
        fold: changes a float32 chunk in place; None yields the chunks in the stored dtype.

    Raises:
        CheckpointError: the stored tensor has another shape than the config asks for.
    """
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
    """Yield a tensor of a source in its stored dtype, a large one in chunks of rows.

    Args:
        source: the float checkpoint.
        name: the tensor's full name.
        finite: whether to raise NumericsError for NaN or Inf.
    """
    spec = source.specs.get(name) or source.extras[name]
    height, *others = spec.shape or (1,)
    width = math.prod(others)
    chunks: Iterator[Tensor]
    if height * width <= ROWS_ELEMENTS or name in source.extras:
        chunks = (tensor for _, tensor in source.tensors([name]))
    else:
        chunks = source.rows(name, max(1, ROWS_ELEMENTS // max(1, width)))
    for rows in chunks:
        if finite and not all_finite(rows):
            raise NumericsError(f"{source.name}: tensor '{name}' holds NaN or Inf")
        yield rows


def coded_rows(source: Source, name: str) -> Iterator[QuantizedWeight]:
    """Yield an embedding or a head, rounded to 8 bits with one scale per row, in chunks of rows.

    Args:
        source: the float checkpoint.
        name: the full name of the weight.

    Raises:
        NumericsError: the weight contains NaN or Inf.
    """
    return map(_coded, stored_rows(source, name, finite=True))


def _coded(rows: Tensor) -> QuantizedWeight:
    return round_to_nearest(rows, row_grid(rows.shape[1]))


class ModelTail:
    """Final norm and head, run by the model's own code; the head is loaded whole, in float32.

    It is the model with all blocks removed: a hook passes the hidden states to the final norm.
    """

    def __init__(
        self, source: Source, plan: Plan, device: torch.device, as_stored: bool = False
    ) -> None:
        """Load final norm and head.

        Args:
            source: the float checkpoint.
            plan: its plan.
            device: where to load them.
            as_stored: whether to compute as the quantized model does: with an 8-bit head if the
                plan stores it so, and with the runtime operator for the inverse residual rotation,
                which is computed in float64 otherwise.
        """
        self._model, self._plan, self._as_stored = source.skeleton(check=False), plan, as_stored
        model, parts = self._model, plan.parts
        # Without a head nothing follows the final norm.
        last = parts.embedding if plan.wiring.tied else parts.head
        for name in (parts.positions, parts.entry_norm, parts.final_norm, last):
            if name is not None:
                load_module(model.get_submodule(name), name, source, WORKING_DTYPE)
        if plan.wiring.tied and last is not None and parts.head is not None:
            head = model.get_submodule(parts.head)
            biases = [f"{parts.head}.{name}" for name in head.state_dict() if name != "weight"]
            for name, tensor in source.tensors(biases):  # only the weight is tied
                bias = nn.Parameter(tensor.to(WORKING_DTYPE, copy=True), requires_grad=False)
                head.register_parameter(name.rpartition(".")[2], bias)
            head.register_parameter("weight", model.get_submodule(last).get_parameter("weight"))
        if as_stored and plan.tables and last is not None and parts.head is not None:
            self._quantize_head(last, parts.head)
        model.set_submodule(parts.layers, nn.ModuleList())
        for name in (parts.positions, parts.entry_norm, parts.final_norm, last, parts.head):
            if name is not None:
                model.get_submodule(name).to(device)

    def _quantize_head(self, name: str, head: str) -> None:
        """Replace the head's matrix by its 8-bit form. name: the module that holds the matrix."""
        model = self._model
        weight = model.get_submodule(name).get_parameter("weight")
        bias = getattr(model.get_submodule(head), "bias", None)
        install_ends(model, self._plan)
        quantized = model.get_submodule(name)
        if isinstance(quantized, QuantizedEmbedding):
            quantized.set_weight(_coded(weight))
        elif isinstance(quantized, QuantizedLinear):
            quantized.set_weight(_coded(weight), bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits, float32 (sequences, tokens, vocabulary), for the last block's output.

        Of a model that predicts no tokens the last hidden states, as `final_output` of it.

        Args:
            hidden: float32 (sequences, tokens, hidden_size), in the basis of the plan's residual
                rotation.
        """
        rotation = self._plan.residual_rotation
        end = hidden
        if rotation is not None and self._as_stored:
            end = OnlineRotation(rotation, transposed=True).to(hidden.device)(hidden)
        elif rotation is not None:
            end = rotation.apply_transposed(hidden)
        behind = self._model.get_submodule(self._plan.parts.behind_blocks)
        with behind.register_forward_pre_hook(lambda _, args: (end, *args[1:])):
            if self._plan.parts.head is not None:
                final: Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
            else:
                decoder = self._model.get_submodule(self._plan.parts.decoder)
                final = decoder(inputs_embeds=hidden, use_cache=False)[0]
        return final.float()


def _load_rows(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    embedding: nn.Embedding,
    tokens: Sequence[Tensor],
    as_stored: bool,
) -> list[Tensor]:
    """Load only the embedding rows of the given tokens; returns the tokens as ids of these rows."""
    name = plan.parts.embedding
    used: Tensor
    ids: Tensor
    used, ids = torch.cat([batch.flatten() for batch in tokens]).unique(return_inverse=True)
    if len(used) and used[0] < 0:
        raise CalibrationError(f"token {int(used[0])} is no row of {name}: ids begin with 0")
    first, used_rows = 0, list[Tensor]()
    for rows in float_rows(source, model, name):
        in_chunk = used[(used >= first) & (used < first + len(rows))] - first
        used_rows.append(rows[in_chunk].clone())
        first += len(rows)
    if len(used) and used[-1] >= first:
        raise CalibrationError(f"token {int(used[-1])} is beyond the {first} rows of {name}")
    # In float32: Gemma's embedding rounds its output times a factor to the weight's dtype.
    weight = torch.cat(used_rows).to(WORKING_DTYPE)
    if as_stored and plan.tables:
        weight = _coded(weight).dequantize(WORKING_DTYPE)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.padding_idx = None  # it refers to the original ids
    split = ids.split([batch.numel() for batch in tokens])
    return [new_ids.view_as(batch) for new_ids, batch in zip(split, tokens, strict=True)]
