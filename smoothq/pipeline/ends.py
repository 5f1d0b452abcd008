"""A float model part by part: embedding, one block, and final norm with head.

An embedding or a head may be larger than any block, so the functions that read them for storing
yield chunks of rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.graph import all_finite, final_output
from ..architectures.linearize import SeparateExperts, linearize_block
from ..checkpoint.source import Source, load_module
from ..data.tokens import Batch
from ..errors import NumericsError
from ..modules import OnlineRotation, QuantizedEmbedding, QuantizedLinear
from ..modules.quantized_embedding import row_grid
from ..plan.account import Account
from ..plan.install import install_ends, tower_linear
from ..plan.plan import BlockPlan, Plan
from ..rounding.grid import QuantizedWeight
from ..rounding.rtn import round_to_nearest
from ..runtime.distributed import World
from ..runtime.mapped import touch
from ..transforms.norm_fusion import fuse_norms
from ..transforms.rotation import rotate_residual
from .hidden_states import HiddenStates
from .trace import in_place_of_blocks
from .weights_on_demand import ROWS_ELEMENTS, WORKING_DTYPE, WeightsOnDemand

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Block:
    """A decoder block loaded from the source.

    Attributes:
        module: the block in float32, linearized.
        name: its full name in the model.
        index: its number in the model.
        plan: how it is quantized.
        directory: for files of what is mapped, or None.
    """

    module: nn.Module
    name: str
    index: int
    plan: BlockPlan
    directory: Path | None = None


def embed_tokens(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor | Batch],
    world: World,
    directory: Path | None = None,
    *,
    as_stored: bool = False,
    rotate: Callable[[Tensor], Tensor] | None = None,
    rotate_added: Callable[[Tensor], Tensor] | None = None,
) -> HiddenStates:
    """The hidden states that enter the first block, with the plan's residual rotation applied.

    Args:
        source: the float checkpoint.
        model: the float model on the meta device; unchanged on return.
        plan: its plan.
        batches: token ids in micro-batches, int64 (sequences, length), some perhaps with images.
        world: the ranks of the run.
        directory: where to store the hidden states in a file; None keeps them in memory.
        as_stored: whether to round the embedding, and the towers' linears, as the plan stores them.
        rotate: replaces the plan's residual rotation, which is computed in float64.
        rotate_added: likewise, of features that the decoder adds between its blocks; None does as
            `rotate`.

    Raises:
        CalibrationError: a token id is negative or not below the number of embedding rows, or the
            model does not take a batch.
    """
    inputs = [batch if isinstance(batch, Batch) else Batch(batch) for batch in batches]
    weights = WeightsOnDemand(
        source,
        model,
        plan,
        _all(inputs),
        CPU,
        _coding(plan, as_stored),
        head=False,
    )
    towers = as_stored and any(batch.features for batch in inputs)
    with towers_as_stored(source, model, plan, CPU) if towers else nullcontext():
        return HiddenStates.embed_tokens(
            model,
            plan,
            inputs,
            world,
            weights,
            directory,
            rotate=rotate,
            rotate_added=rotate_added,
        )


def _all(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.tokens.flatten() for batch in batches])


def _coding(plan: Plan, as_stored: bool) -> Callable[[Tensor], QuantizedWeight] | None:
    """How rows of the embedding are rounded; None for an embedding in float."""
    return _coded if as_stored and plan.tables else None


def load_block(
    source: Source,
    model: PreTrainedModel,
    plan: Plan,
    index: int,
    device: torch.device,
    directory: Path | None = None,
) -> Block:
    """Load one block: linearized, in float32, with the plan's residual rotation folded in.

    Args:
        source: the float checkpoint.
        model: the float model on the meta device; its block is copied.
        plan: its plan.
        index: the block's number.
        device: where to load the block.
        directory: for files of large stacks of experts; None has all in memory.
    """
    name, block_plan = plan.parts.block_name(index), plan.blocks[index]
    module = copy.deepcopy(model.get_submodule(name))
    load_module(module, name, source, WORKING_DTYPE, directory)
    linearize_block(module)
    _touch_experts(module)
    module.to(device)
    if plan.residual_rotation is not None:
        fuse_norms(module, block_plan.graph)
        rotate_residual(module, block_plan.graph, plan.residual_rotation)
    return Block(module, name, index, block_plan, directory)


def _touch_experts(block: nn.Module) -> None:
    """Have each expert's linear say when it is used, as mapped ones are to."""
    for module in block.modules():
        if isinstance(module, SeparateExperts):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    linear.register_forward_pre_hook(lambda used, _: touch(used.weight))


def load_tower(source: Source, model: PreTrainedModel, plan: Plan, name: str) -> QuantizedLinear:
    """A linear of a tower, rounded to nearest, on the CPU.

    Args:
        source: the float checkpoint.
        model: the float model on the meta device.
        plan: its plan.
        name: the linear's full name.
    """
    linear = copy.deepcopy(model.get_submodule(name))
    quantized = tower_linear(name, model, plan)
    load_module(linear, name, source, WORKING_DTYPE)
    assert isinstance(linear, nn.Linear)
    weight = round_to_nearest(linear.weight.data, quantized.spec.grid)
    quantized.set_weight(weight, linear.bias)
    return quantized


def tower_tensors(
    source: Source, model: PreTrainedModel, plan: Plan, name: str, account: Account
) -> dict[str, Tensor]:
    """The stored tensors of a quantized linear of a tower, by their full names."""
    stored = load_tower(source, model, plan, name).state_dict()
    named = {f"{name}.{key}": tensor for key, tensor in stored.items()}
    return {key: tensor.to(account[key].dtype) for key, tensor in named.items()}


@contextmanager
def towers_as_stored(
    source: Source, model: PreTrainedModel, plan: Plan, device: torch.device
) -> Iterator[None]:
    """Context in which a float model on the meta device has the quantized linears of its towers."""
    floats = {name: model.get_submodule(name) for name in plan.towers}
    loaded = {name: load_tower(source, model, plan, name).to(device) for name in floats}
    try:
        for name, quantized in loaded.items():
            model.set_submodule(name, quantized)
        yield
    finally:
        for name, linear in floats.items():
            model.set_submodule(name, linear)


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
    """What follows the blocks, final norm and head, run by the model's own code in float32.

    The model is run on the tokens with the results of its blocks known. Its weights outside the
    blocks are loaded where they are needed; the head stays loaded.
    """

    def __init__(
        self, source: Source, plan: Plan, stream: HiddenStates, as_stored: bool = False
    ) -> None:
        """Load the head, if it is stored in 8 bits; anything else is loaded by the first run.

        Args:
            source: the float checkpoint.
            plan: its plan.
            stream: hidden states of the tokens that the model will be run on, of any block.
            as_stored: whether to compute as the quantized model does: with an 8-bit head if the
                plan stores it so, with quantized towers, and with the runtime operator for the
                inverse residual rotation, which is computed in float64 otherwise.
        """
        self._model, self._plan = source.skeleton(check=False), plan
        self._source, self._as_stored = source, as_stored
        device, model = stream.device, self._model
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._weights = WeightsOnDemand(
            source, model, plan, _all(stream.batches), device, _coding(plan, as_stored)
        )
        if as_stored and plan.tables and plan.parts.head is not None:
            self._quantize_head(device, plan.parts.head)
        self._end = _end_of_rotation(plan, device, as_stored)

    def _quantize_head(self, device: torch.device, head: str) -> None:
        """Replace the head by its 8-bit form."""
        model, parts = self._model, self._plan.parts
        embedding = model.get_submodule(parts.embedding)
        last = parts.embedding if self._plan.wiring.tied else head
        weight = self._weights.load(f"{last}.weight")
        bias = getattr(model.get_submodule(head), "bias", None)
        install_ends(model, self._plan)
        quantized = model.get_submodule(last)
        if isinstance(quantized, QuantizedEmbedding):
            quantized.set_weight(_coded(weight))
        elif isinstance(quantized, QuantizedLinear):
            loaded = None if bias is None else self._weights.load(f"{head}.bias")
            quantized.set_weight(_coded(weight), loaded)
        model.get_submodule(head).to(device)
        model.set_submodule(parts.embedding, embedding)  # whose rows are rounded as they are read

    @torch.no_grad()
    def logits(self, stream: HiddenStates, number: int) -> Tensor:
        """The logits of a micro-batch, float32 (sequences, tokens, vocabulary); collective.

        Of a model that predicts no tokens the last hidden states, as `final_output` of it.

        Args:
            stream: what the last block returned, in the basis of the plan's residual rotation.
            number: of the micro-batch.
        """
        reply = stream.behind(number, self._end)
        batch = stream.batches[number].to(stream.device)
        towers = self._as_stored and batch.features
        context = towers_as_stored(self._source, self._model, self._plan, stream.device)
        with (
            context if towers else nullcontext(),
            in_place_of_blocks(self._model, self._plan.parts, reply),
            self._weights,
        ):
            return output_of(self._model, batch).float()


def output_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A model's logits for a batch, or its last hidden states, as of `final_output`."""
    return final_output(model, batch.tokens, use_cache=False, **batch.features)


def _end_of_rotation(
    plan: Plan, device: torch.device, as_stored: bool
) -> Callable[[Tensor], Tensor]:
    """The inverse of a plan's residual rotation, by the runtime operator or in float64."""
    rotation = plan.residual_rotation
    if rotation is None:
        return lambda hidden: hidden
    if as_stored:
        return OnlineRotation(rotation, transposed=True).to(device)
    return rotation.apply_transposed
