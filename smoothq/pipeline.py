"""The whole job: one pass over the decoder blocks, one block in memory at a time.

What is done to a block needs only the block and the hidden states that enter it, because the one
global choice, the rotation of the residual stream, is made before the first block. Read `_run`
and `_quantize_block`; the rest of this file is what they call.
"""

from __future__ import annotations

import copy
import logging
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures.graph import is_tied
from .architectures.layout import open_block
from .calibration import TextSource, calibration_tokens
from .checkpoint.stream import Source, load_module, skeleton, unload_module
from .checkpoint.writer import CheckpointWriter
from .errors import CalibrationError
from .hidden_states import HiddenStates
from .integrations.transformers import SmoothqConfig
from .migration import search_alpha
from .modules import InputQuantizer, QuantizedEmbedding, QuantizedLinear, SequenceContext
from .modules.quantized_embedding import row_grid
from .observers import SecondMoment
from .plan import (
    Bits,
    BlockPlan,
    Plan,
    SitePlan,
    check_device,
    install_ends,
    install_inputs,
    install_linear,
    make_plan,
)
from .recipe import Recipe
from .report import model_card
from .rounding.gptq import Factor, factorise, gptq
from .rounding.grid import QuantizedWeight
from .rounding.rtn import round_to_nearest
from .transforms.norm_fusion import fuse_norms
from .transforms.rotation import (
    rotate_ends_offline,
    rotate_input,
    rotate_residual,
    rotate_value_output,
)
from .transforms.smoothing import smooth
from .tuning import tune
from .version import __version__

log = logging.getLogger("smoothq")

WORKING_DTYPE = torch.float32  # of a block while it is worked on; folding itself is in float64
HESSIAN_BYTES = 1 << 30  # of experts' Hessians that are held at once


class Progress(Protocol):
    """Told where the pass is."""

    def __call__(self, block: int, blocks: int, stage: str) -> None:
        """Block `block` of `blocks` (from 0) has entered `stage`."""


@dataclass(frozen=True)
class Result:
    """What a quantization came to: the figures of the closing table.

    bytes_before, bytes_after: all tensors of the model; linear_bytes: the quantized ones.
    peak_memory: bytes of the whole process, libraries included.
    """

    name: str
    recipe: Recipe
    bits: Bits
    bytes_before: int
    bytes_after: int
    linear_bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Block:
    """The block at hand: its module, its name and index in the model, and its plan."""

    module: nn.Module
    name: str
    index: int
    plan: BlockPlan


def plan_checkpoint(source: Source, recipe: Recipe, device: str = "cpu") -> Plan:
    """What quantizing a source would come to, from its config alone.

    Raises SmoothqError for what cannot be done, as `quantize_checkpoint` would.
    """
    check_device(device)
    return make_plan(skeleton(source), recipe)


def quantize_checkpoint(
    source: Source,
    recipe: Recipe,
    writer: CheckpointWriter,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Tensor | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Quantize a source into a checkpoint directory.

    data: calibration tokens, int64 (samples, length); without it the recipe's text is read.
    Raises SmoothqError for whatever cannot be done, before any work where that can be known.
    """
    start = time.perf_counter()
    check_device(device)
    model = skeleton(source)
    plan = make_plan(model, recipe)
    writer.check(plan.total_bytes)
    tokenizer = tokenizer or source.tokenizer()
    tokens = _calibration_tokens(recipe, source, tokenizer, data)
    with writer:
        _run(source, plan, model, tokens, writer, torch.device(device), progress or _silent)
        result = Result(
            name=source.name,
            recipe=recipe,
            bits=plan.bits,
            bytes_before=source.nbytes,
            bytes_after=writer.total_bytes,
            linear_bytes=plan.linear_bytes,
            seconds=time.perf_counter() - start,
            peak_memory=_peak_memory(),
            notes=plan.notes,
        )
        config = copy.deepcopy(source.config)
        config.architectures = [type(model).__name__]
        config.dtype = plan.stored_dtype
        config.quantization_config = SmoothqConfig.of(plan, __version__)
        writer.finish(config, tokenizer, source.generation_config, model_card(result))
    return result


@torch.no_grad()
def _run(
    source: Source,
    plan: Plan,
    model: PreTrainedModel,
    tokens: Tensor | None,
    writer: CheckpointWriter,
    device: torch.device,
    progress: Progress,
) -> None:
    """The pass: what enters the blocks, each block, and what is stored of them."""
    stream = _quantize_ends(source, plan, model, tokens, writer, device)
    unquantized = stream.copy() if stream is not None and plan.recipe.tuning else None
    for index, block_plan in enumerate(plan.blocks):
        name = f"{plan.parts.layers}.{index}"
        block = _Block(model.get_submodule(name), name, index, block_plan)
        progress(index, len(plan.blocks), "load")
        load_module(block.module, name, source, WORKING_DTYPE)
        open_block(block.module)
        block.module.to(device)
        _quantize_block(
            block,
            plan,
            stream,
            unquantized,
            lambda stage, i=index: progress(i, len(plan.blocks), stage),
        )
        writer.add(_to_store(block.module, name, plan.stored_dtype))
        unload_module(block.module)


def _quantize_block(
    block: _Block,
    plan: Plan,
    stream: HiddenStates | None,
    unquantized: HiddenStates | None,
    stage: Stage,
) -> None:
    """Transform and quantize one block, and move the hidden states past it.

    unquantized: the hidden states of the float model, where the recipe tunes blocks towards them.
    """
    recipe, graph = plan.recipe, block.plan.graph
    if plan.residual_rotation is not None:
        stage("rotate")
        fuse_norms(block.module, graph)
        rotate_residual(block.module, graph, plan.residual_rotation)
    follows_float = recipe.smoothing is not None and not recipe.sees_quantized
    if recipe.smoothing is not None and stream is not None:
        stage("smooth")
        _smooth(block, plan, stream, advance=follows_float)
    if graph.value_output is not None and block.plan.value_rotation is not None:
        rotate_value_output(block.module, graph.value_output, block.plan.value_rotation)
    if unquantized is not None:
        stage("float forward")
        unquantized.advance(block.module, block.index)
    inputs = install_inputs(block.module, block.plan, SequenceContext(), block.name)
    for site_input in inputs.values():
        site_input.to(next(block.module.parameters()).device)
    unrounded: dict[str, Tensor] = {}
    for name, together in groupby(block.plan.sites, key=lambda site_plan: site_plan.site.stage):
        stage(f"quantize {name}")
        unrounded |= _quantize_sites(block, list(together), inputs, recipe, stream)
    if stream is not None and unquantized is not None and recipe.tuning is not None:
        stage("tune")
        tune(block.module, block.index, block.plan, unrounded, stream, unquantized, recipe.tuning)
    if stream is not None and not follows_float:
        stage("forward")
        stream.advance(block.module, block.index)


def _smooth(block: _Block, plan: Plan, stream: HiddenStates, advance: bool) -> None:
    """Smooth the edges that the recipe names. advance: the hidden states follow the float model."""
    smoothing = plan.recipe.smoothing
    assert smoothing is not None
    plans = [each for each in block.plan.sites if each.site.edge in smoothing.edges]
    entering = stream.copy()
    maxima = stream.maxima(
        block.module,
        block.name,
        block.index,
        [each.site for each in plans],
        smoothing.quantile,
        advance,
    )
    for each in plans:
        seen, alpha = maxima[each.site.name], smoothing.alpha_of(each.site.edge)
        if alpha == "auto":
            alpha = search_alpha(block.module, block.index, each, seen, entering)
            log.debug("%s, %s: alpha %g", block.name, each.site.name, alpha)
        smooth(block.module, each.site, seen, alpha, plan.stored_dtype)


def _quantize_sites(
    block: _Block,
    plans: list[SitePlan],
    inputs: dict[str, InputQuantizer],
    recipe: Recipe,
    stream: HiddenStates | None,
) -> dict[str, Tensor]:
    """Calibrate sites that run side by side, round their weights, and put quantized linears in.

    Returns, by module, what the codes of its weight were rounded from.
    """
    unrounded: dict[str, Tensor] = {}
    lanes: list[_Lane] = []
    for plan in plans:
        site, site_input = plan.site, inputs[plan.site.name]
        if plan.input.rotation is not None:
            for reader in site.readers:
                rotate_input(reader.view(block.module), plan.input.rotation)
        if stream is not None:
            normalise = recipe.runtime_smoothing is not None and recipe.runtime_smoothing.normalise
            stream.calibrate(block.module, block.index, site, site_input, normalise)
        lanes += [_Lane(plan, modules, site_input) for modules in site.lanes]
    for together in _in_memory(lanes):
        factors: dict[str, Factor | None] = {}
        if stream is not None and recipe.weights.rounding == "gptq":
            watched = {lane.modules[0]: lane.input for lane in together}
            seen = stream.hessians(block.module, block.index, watched)
            for lane in together:
                module = lane.modules[0]
                factors[module] = _factor(block, lane, seen.pop(module), recipe)
        for lane in together:
            for name in lane.modules:
                rounded = _round(block, lane, name, factors.get(lane.modules[0]), recipe)
                assert rounded.unrounded is not None
                unrounded[name] = rounded.unrounded
    return unrounded


@dataclass(frozen=True)
class _Lane:
    """Modules of a site that the same tokens reach."""

    plan: SitePlan
    modules: tuple[str, ...]
    input: InputQuantizer

    @property
    def routed(self) -> bool:
        """Whether a router decides which tokens these are."""
        readers = self.plan.site.readers
        return any(reader.routed for reader in readers if reader.module in self.modules)


def _in_memory(lanes: list[_Lane]) -> Iterator[list[_Lane]]:
    """Lanes in runs whose Hessians are held at once."""
    run: list[_Lane] = []
    for lane in lanes:
        if run and 8 * sum(each.input.spec.width**2 for each in [*run, lane]) > HESSIAN_BYTES:
            yield run
            run = []
        run.append(lane)
    yield run


def _factor(block: _Block, lane: _Lane, seen: SecondMoment, recipe: Recipe) -> Factor | None:
    """What GPTQ needs for a lane; None for an expert that too few tokens reached."""
    where = f"{block.name}, {lane.plan.site.name if not lane.routed else lane.modules[0]}"
    if lane.routed and seen.tokens < recipe.gptq.least_tokens:
        log.warning(
            "%s: %d tokens of the calibration text reached this expert; rounded to nearest",
            where,
            seen.tokens,
        )
        return None
    return factorise(seen.result(), recipe.gptq, where)


def _round(
    block: _Block, lane: _Lane, name: str, factor: Factor | None, recipe: Recipe
) -> QuantizedWeight:
    """Round one linear of a lane and put the quantized one in its place."""
    linear = block.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    grid = lane.plan.modules[name].grid
    if factor is None:
        rounded = round_to_nearest(linear.weight, grid)
    else:
        rounded = gptq(linear.weight, factor, grid, recipe.gptq.block_size)
    install_linear(block.module, name, lane.plan, lane.input).set_weight(rounded, linear.bias)
    return rounded


def _quantize_ends(
    source: Source,
    plan: Plan,
    model: PreTrainedModel,
    tokens: Tensor | None,
    writer: CheckpointWriter,
    device: torch.device,
) -> HiddenStates | None:
    """Store all that is not a block, rotated where R1 folds; take the tokens to the first block."""
    parts, rotation = plan.parts, plan.residual_rotation
    large = [parts.embedding, *([] if is_tied(model) else [parts.head])]
    small = [name for name in (parts.positions, parts.entry_norm, parts.final_norm) if name]
    for name in large:
        # A matrix that stays as it is stays in its dtype: it may be the largest of the model.
        dtype = WORKING_DTYPE if plan.folds_ends else None
        load_module(model.get_submodule(name), name, source, dtype)
    for name in small:
        load_module(model.get_submodule(name), name, source, WORKING_DTYPE)
    stream = None
    if tokens is not None:
        stream = HiddenStates.enter(model, plan, tokens, rotation, device)
    if rotation is not None:
        rotate_ends_offline(model, parts, rotation, plan.folds_ends)
    if plan.tables:
        _quantize_tables(model, plan, large)
    for name in [*large, *small]:
        writer.add(_to_store(model.get_submodule(name), name, plan.stored_dtype))
        unload_module(model.get_submodule(name))
    held = (*large, *small, parts.layers, parts.head)
    rest = [
        name
        for name, _ in model.named_parameters()
        if not any(name.startswith(f"{module}.") for module in held)
    ]
    for name, tensor in source.tensors(rest):
        writer.add({name: tensor.to(plan.stored_dtype)})
    return stream


def _quantize_tables(model: PreTrainedModel, plan: Plan, names: list[str]) -> None:
    """Round embedding and untied head by rows and put the modules that hold them in place."""
    floats = {name: model.get_submodule(name) for name in names}
    install_ends(model, plan)
    for name, module in floats.items():
        weight = module.get_parameter("weight")
        rounded = round_to_nearest(weight, row_grid(weight.shape[1]))
        quantized = model.get_submodule(name)
        if isinstance(quantized, QuantizedLinear):
            quantized.set_weight(rounded, getattr(module, "bias", None))
        else:
            assert isinstance(quantized, QuantizedEmbedding)
            quantized.set_weight(rounded)


def _to_store(module: nn.Module, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's tensors by full name; what transformers casts on loading is in `dtype`."""
    stored = {}
    for key, tensor in module.state_dict().items():
        scale = key.rpartition(".")[2] in ("weight_scale", "scale")
        cast = tensor.is_floating_point() and not scale
        stored[f"{name}.{key}"] = tensor.to("cpu", dtype if cast else tensor.dtype)
    return stored


def _calibration_tokens(
    recipe: Recipe,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Tensor | None,
) -> Tensor | None:
    if not recipe.calibrates:
        return None
    if data is not None:
        return data
    if tokenizer is None:
        raise CalibrationError(
            f"{source.name} has no tokenizer for calibration text; pass a tokenizer, or data"
        )
    text = recipe.calibration
    return calibration_tokens(
        tokenizer,
        TextSource(text.source, text.split, text.text_column),
        text.samples,
        text.sequence_length,
        recipe.seed,
    )


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


class Stage(Protocol):
    """Told which stage of a block has begun."""

    def __call__(self, stage: str) -> None:
        """`stage` has begun."""


def _silent(block: int, blocks: int, stage: str) -> None:
    """No progress is wanted."""
