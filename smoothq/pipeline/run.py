"""Quantize a checkpoint in one pass over the decoder blocks, with one block in memory at a time.

Quantizing a block needs only the block and the hidden states that enter it. The only transform that
spans blocks, the rotation of the residual stream, is fixed by the plan, and `load_block` folds it
into each block's weights. Start with `_run` and `_quantize_block`; the rest of this file is what
they call.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.graph import is_tied
from ..architectures.positions import positions_of, within_positions
from ..checkpoint.manifest import RunKey
from ..checkpoint.source import Source, unload_module
from ..checkpoint.writer import CheckpointWriter, Environment
from ..data.calibration import tokens_of
from ..data.text import TextSource, calibration_tokens
from ..data.tokens import Tokens
from ..errors import CalibrationError, CheckpointError
from ..modules import InputQuantizer, SequenceContext
from ..modules.quantized_embedding import EMBEDDING_BITS
from ..plan.account import Account, account_of, nbytes_of, outside_blocks
from ..plan.config import SmoothqConfig
from ..plan.install import install_inputs, install_linear
from ..plan.plan import Plan, SitePlan
from ..plan.resolve import make_plan
from ..progress import Progress, Stage, silent
from ..recipe.recipe import Recipe
from ..report.model_card import model_card
from ..report.quantize_result import QuantizeResult
from ..rounding.gptq import Factor, factorise, gptq
from ..rounding.grid import QuantizedWeight
from ..rounding.packing import pack, packed_like
from ..rounding.rtn import round_to_nearest
from ..runtime.device import check_device
from ..runtime.distributed import World
from ..runtime.memory import give_back, peak_memory, steady_heap
from ..runtime.process import default_modes
from ..transforms.rotation import rotate_input, rotate_value_output
from ..transforms.smoothing import smooth
from ..version import __version__
from .alpha_search import search_alpha
from .block_tuning import tune
from .ends import Block, coded_rows, embed_tokens, load_block, stored_rows
from .estimate import estimate_resources
from .hidden_states import HiddenStates
from .monitor import STREAM, BlockDone, PerplexityMonitor, Probe
from .observers import SecondMoment
from .round_trip import STREAM as ROUNDTRIP
from .round_trip import RoundTrip
from .shared_writer import SharedWriter

log = logging.getLogger("smoothq")

HESSIAN_BYTES = 1 << 30  # of experts' Hessians in memory at once


OnBlock = Callable[[BlockDone], None]


@default_modes()
def quantize_checkpoint(
    source: Source,
    recipe: Recipe,
    writer: CheckpointWriter,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    max_memory: int | None = None,
    on_block: OnBlock | None = None,
    probe: Probe | None = None,
    check: bool = True,
) -> QuantizeResult:
    """Quantize a source into a checkpoint directory, or resume an interrupted run.

    In a distributed run every rank must call this: the ranks share the work, and rank 0 writes. If
    a complete output of the same source, recipe and data already exists, nothing is done.

    Args:
        source: the float checkpoint.
        recipe: how to quantize it.
        writer: writes the output directory and saves the states to resume from.
        tokenizer: tokenizes calibration text, and is saved with the output; None for the source's.
        data: the calibration data, as for `quantize`; None for the text that the recipe names.
        device: where the blocks are quantized, such as "cpu" or "cuda".
        progress: called with (block, number of blocks, stage) as the work proceeds.
        max_memory: bytes that the process may use; None for no limit.
        on_block: callback after each stored block. An exception from it stops the run; calling
            this function again with the same output resumes.
        probe: tokens on which perplexity is measured during the run; the result is passed to
            `on_block`.
        check: whether to load the written checkpoint again and compare it with what was computed,
            before it is renamed to the output.

    Returns: sizes, time and memory of the run.

    Raises:
        SmoothqError: the source, recipe, data or output is unfit. Raised before the first block is
            worked on if it can be detected by then.
    """
    start = time.perf_counter()
    check_device(device)
    world = World.join(device)
    model = source.skeleton()
    plan = make_plan(model, recipe)
    side_files = source.side_files().with_tokenizer(tokenizer)
    tokens = _calibration_tokens(plan, source, model, tokenizer, data)
    account = account_of(model, plan, source)
    needs = estimate_resources(
        plan, max_memory, writer.every, 0 if tokens is None else tokens.count
    )
    disk = needs.disk + side_files.nbytes + nbytes_of(source.extras)
    world.broadcast_from(lambda: writer.check(disk, source.paths))
    output = SharedWriter(writer, world)
    identity = _identity(source, recipe, tokens)
    config = _config_of(source, model, plan)
    result = QuantizeResult(
        name=source.name,
        recipe=plan.recipe,
        bits=plan.bits,
        bytes_before=source.nbytes,
        bytes_after=nbytes_of(account),
        linear_bytes=plan.linear_bytes,
        seconds=0.0,
        peak_memory=peak_memory(),
        notes=(*plan.notes, *source.notes, *_dtype_note(source, plan)),
        repeated=True,
    )
    if output.is_finished(identity, config, side_files):
        return result
    ours = (f"{writer.out.name}/", f"{writer.partial.name}/")
    left_out = [name for name in side_files.left_out if name not in ours]
    if world.is_main and left_out:
        log.info("not copied from %s: %s", source.name, ", ".join(left_out))
    with output, steady_heap():
        begun = output.begin(identity, Environment.here(world.device.type, world.size))
        roundtrip = RoundTrip(source, model, plan, account, world) if check else None
        shown = progress or silent
        job = _Job(source, plan, model, account, output, world, shown, on_block, roundtrip)
        directory = writer.scratch if needs.states_on_disk else None
        _run(job, tokens, begun.blocks, directory, probe)
        final = output.assemble(config, side_files, model_card(result))
        output.check(account, final)
        if roundtrip is not None:
            roundtrip.compare(final)
        output.place()
    seconds = time.perf_counter() - start
    return replace(result, seconds=seconds, peak_memory=peak_memory(), repeated=False)


def _config_of(source: Source, model: PreTrainedModel, plan: Plan) -> PretrainedConfig:
    """The output's config: the source's, with class, dtype and tying as they are stored."""
    config = copy.deepcopy(source.config)
    config.architectures = [type(model).__name__]
    config.dtype = plan.stored_dtype
    if not is_tied(model):
        for part in (config, config.get_text_config(decoder=True)):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    config.quantization_config = SmoothqConfig.of(plan, __version__)
    return config


def _dtype_note(source: Source, plan: Plan) -> Iterator[str]:
    """Yield a note if the source's config names another dtype than its tensors have."""
    named = source.config.dtype
    if named is not None and plan.recipe.dtype == "auto" and plan.stored_dtype != named:
        yield f"its config says {named}, its tensors are {plan.stored_dtype}: stored as they are"


@dataclass(frozen=True)
class _Job:
    """What stays the same during a run: source, plan, output and callbacks.

    account: shape and dtype of every tensor of the output.
    """

    source: Source
    plan: Plan
    model: PreTrainedModel
    account: Account
    output: SharedWriter
    world: World
    progress: Progress
    on_block: OnBlock | None
    roundtrip: RoundTrip | None


@torch.no_grad()
def _run(
    job: _Job, tokens: Tokens | None, finished: int, directory: Path | None, probe: Probe | None
) -> None:
    """Embed the calibration tokens, then quantize and store block after block.

    finished: number of blocks that the output contains already. directory: where to store hidden
    states in files, or None to keep them in memory.
    """
    plan, output = job.plan, job.output
    streams = _streams(job, tokens, directory)
    probing = None
    if probe is not None:
        probing = PerplexityMonitor(probe, job.source, job.model, plan, job.world)
        streams[STREAM] = probing.stream
    if job.roundtrip is not None:
        streams[ROUNDTRIP] = job.roundtrip.stream
    if not finished:
        _store_ends(job)
    for name, stream in streams.items() if finished else ():
        stream.replace(output.stream(name))
    for index in range(finished, len(plan.blocks)):
        job.progress(index, len(plan.blocks), "load")
        block = load_block(job.source, job.model, plan, index, job.world.device)
        stage = partial(_enter_stage, job, index)
        _quantize_block(block, job, streams.get("quantized"), streams.get("float"), stage)
        perplexity = None if probing is None else probing.follow(block.module, index)
        stored = _to_store(block, job.source, job.account)
        output.add(stored)
        if job.roundtrip is not None:
            job.roundtrip.follow(block, stored)
        unload_module(block.module)
        output.block_done(index + 1, len(plan.blocks), streams)
        if job.on_block is not None:
            reference = None if probing is None else probing.float_perplexity
            job.on_block(BlockDone(index, len(plan.blocks), perplexity, reference))


def _enter_stage(job: _Job, index: int, stage: str) -> None:
    """Report the stage and return freed memory to the system, as a fragmented heap would grow."""
    give_back()
    job.progress(index, len(job.plan.blocks), stage)


def _quantize_block(
    block: Block,
    job: _Job,
    stream: HiddenStates | None,
    unquantized: HiddenStates | None,
    stage: Stage,
) -> None:
    """Transform and quantize one block, and advance the hidden states through it.

    stream: the hidden states of the quantized model, or None without calibration. unquantized:
    those of the float model, if the recipe tunes blocks, else None.
    """
    plan, recipe = job.plan, job.plan.recipe
    follows_float = recipe.smoothing is not None and not recipe.sees_quantized
    transform_block(block, plan, stream, follows_float, stage)
    if unquantized is not None:
        stage("float forward")
        unquantized.advance(block.module, block.index)
    inputs = install_inputs(block.module, block.plan, SequenceContext(), block.name)
    for site_input in inputs.values():
        site_input.to(next(block.module.parameters()).device)
    unrounded: dict[str, Tensor] = {}
    for name, together in groupby(block.plan.sites, key=lambda site_plan: site_plan.site.stage):
        stage(f"quantize {name}")
        unrounded |= _quantize_sites(block, job, list(together), inputs, stream)
    if stream is not None and unquantized is not None and recipe.tuning is not None:
        stage("tune")
        tune(block.module, block.index, block.plan, unrounded, stream, unquantized, recipe.tuning)
    if stream is not None and not follows_float:
        stage("forward")
        stream.advance(block.module, block.index)


def transform_block(
    block: Block,
    plan: Plan,
    stream: HiddenStates | None,
    advance: bool = False,
    stage: Stage | None = None,
) -> None:
    """Smooth a float block and rotate its values as planned, in place; it computes the same.

    Args:
        block: the block in float.
        plan: the model's plan.
        stream: the hidden states that enter the block; None leaves it unsmoothed.
        advance: whether to advance `stream` through the float block, if the recipe smooths.
        stage: called with the name of the stage.
    """
    recipe, graph = plan.recipe, block.plan.graph
    if recipe.smoothing is not None and stream is not None:
        if stage is not None:
            stage("smooth")
        _smooth(block, plan, stream, advance)
    if graph.value_output is not None and block.plan.value_rotation is not None:
        rotate_value_output(block.module, graph.value_output, block.plan.value_rotation)


def _smooth(block: Block, plan: Plan, stream: HiddenStates, advance: bool) -> None:
    """Smooth the edges that the recipe names. advance: advance `stream` through the float block."""
    smoothing = plan.recipe.smoothing
    assert smoothing is not None
    plans = [site_plan for site_plan in block.plan.sites if site_plan.site.edge in smoothing.edges]
    entering = stream.copy()
    maxima = stream.maxima(
        block.module,
        block.name,
        block.index,
        [site_plan.site for site_plan in plans],
        smoothing.quantile,
        advance,
    )
    for site_plan in plans:
        site = site_plan.site
        alpha = smoothing.alpha_of(site.edge)
        if alpha == "auto":
            alpha = search_alpha(block.module, block.index, site_plan, maxima[site.name], entering)
            log.debug("%s, %s: alpha %g", block.name, site.name, alpha)
        smooth(block.module, site, maxima[site.name], alpha, plan.stored_dtype)


def _quantize_sites(
    block: Block,
    job: _Job,
    plans: list[SitePlan],
    inputs: dict[str, InputQuantizer],
    stream: HiddenStates | None,
) -> dict[str, Tensor]:
    """Calibrate sites of one stage, round their weights, and install the quantized linears.

    In a distributed run each rank rounds a share of the matrices. Returns module name → float
    (N, K), the values that its codes were rounded from; empty unless the recipe tunes blocks.
    """
    recipe, world = job.plan.recipe, job.world
    unrounded: dict[str, Tensor] = {}
    token_groups: list[_TokenGroup] = []
    for plan in plans:
        site, site_input = plan.site, inputs[plan.site.name]
        if plan.input.rotation is not None:
            for reader in site.readers:
                rotate_input(reader.view(block.module), plan.input.rotation)
        if stream is not None:
            normalise = recipe.runtime_smoothing is not None and recipe.runtime_smoothing.normalise
            stream.calibrate(block.module, block.index, site, site_input, normalise)
        token_groups += [_TokenGroup(plan, modules, site_input) for modules in site.token_groups]
    for together in _in_memory(token_groups):
        moments: dict[str, SecondMoment] = {}
        if stream is not None and recipe.weights.rounding == "gptq":
            watched = {token_group.modules[0]: token_group.input for token_group in together}
            moments = stream.hessians(block.module, block.index, watched)
        factors = _Factors(block, moments, recipe)
        work = [(token_group, name) for token_group in together for name in token_group.modules]
        for turn in (work[i : i + world.size] for i in range(0, len(work), world.size)):
            local = world.raise_together(partial(_round_local, block, turn, factors, job))
            for rank, (token_group, name) in enumerate(turn):
                rounded = world.broadcast_from(lambda local=local: local, rank)  # type: ignore[misc]
                assert rounded is not None
                rounded = rounded.to(world.device)
                linear = block.module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                quantized = install_linear(block.module, name, token_group.plan, token_group.input)
                quantized.set_weight(rounded, linear.bias)
                if rounded.unrounded is not None:
                    unrounded[name] = rounded.unrounded
            del local, rounded
    return unrounded


def _round_local(
    block: Block, turn: list[tuple[_TokenGroup, str]], factors: _Factors, job: _Job
) -> QuantizedWeight | None:
    """The weight of `turn[rank]`, rounded on this rank; None if the turn has fewer matrices."""
    if job.world.rank >= len(turn):
        return None
    token_group, name = turn[job.world.rank]
    return _round(block, token_group, name, factors.of(token_group), job.plan.recipe)


class _Factors:
    """The Hessian factors of token groups, computed on demand; only the last is kept."""

    def __init__(self, block: Block, moments: dict[str, SecondMoment], recipe: Recipe) -> None:
        """moments: the Hessian of each token group by its first module; empty without GPTQ."""
        self._block, self._moments, self._recipe = block, moments, recipe
        self._last: tuple[str, Factor | None] = ("", None)  # first module, factor

    def of(self, token_group: _TokenGroup) -> Factor | None:
        """The factor of a token group, or None if its matrices are to be rounded to nearest."""
        name = token_group.modules[0]
        if self._last[0] != name:
            self._last = ("", None)
            moment = self._moments.pop(name, None)
            factor = (
                None if moment is None else _factor(self._block, token_group, moment, self._recipe)
            )
            self._last = (name, factor)
        return self._last[1]


@dataclass(frozen=True)
class _TokenGroup:
    """Modules of a site that the same tokens reach: a single expert, or all that is not routed."""

    plan: SitePlan
    modules: tuple[str, ...]
    input: InputQuantizer

    @property
    def routed(self) -> bool:
        """Whether a router decides which tokens reach the modules."""
        readers = self.plan.site.readers
        return any(reader.routed for reader in readers if reader.module in self.modules)


def _in_memory(token_groups: list[_TokenGroup]) -> Iterator[list[_TokenGroup]]:
    """Split token groups into runs whose Hessians fit into memory together."""
    run: list[_TokenGroup] = []
    for token_group in token_groups:
        if (
            run
            and 8 * sum(member.input.spec.width**2 for member in [*run, token_group])
            > HESSIAN_BYTES
        ):
            yield run
            run = []
        run.append(token_group)
    yield run


def _factor(
    block: Block, token_group: _TokenGroup, moment: SecondMoment, recipe: Recipe
) -> Factor | None:
    """The factor of a token group's Hessian; None for an expert that too few tokens reached."""
    site = token_group.modules[0] if token_group.routed else token_group.plan.site.name
    where = f"{block.name}, {site}"
    if token_group.routed and moment.tokens < recipe.gptq.least_tokens:
        log.warning(
            "%s: %d tokens of the calibration text reached this expert; rounded to nearest",
            where,
            moment.tokens,
        )
        return None
    return factorise(moment.result(), recipe.gptq, where)


def _round(
    block: Block, token_group: _TokenGroup, name: str, factor: Factor | None, recipe: Recipe
) -> QuantizedWeight:
    """The rounded weight of one linear of a token group; without a factor rounded to nearest."""
    linear = block.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    grid = token_group.plan.modules[name].grid
    if factor is None:
        rounded = round_to_nearest(linear.weight, grid)
    else:
        rounded = gptq(linear.weight, factor, grid, recipe.gptq.block_size)
    return rounded if recipe.tuning is not None else replace(rounded, unrounded=None)


def _streams(job: _Job, tokens: Tokens | None, directory: Path | None) -> dict[str, HiddenStates]:
    """The hidden states that enter the first block, by name; empty without tokens.

    `quantized` will be advanced through the quantized blocks, and `float`, which exists if the
    recipe tunes blocks, through the float ones.
    """
    if tokens is None:
        return {}
    batches = tokens.micro_batches
    embedded = embed_tokens(job.source, job.model, job.plan, batches, job.world, directory)
    streams = {"quantized": embedded}
    if job.plan.recipe.tuning is not None:
        streams["float"] = embedded.copy()
    return streams


def _store_ends(job: _Job) -> None:
    """Store the tensors outside the blocks: embedding, head, final norm, vision towers, extras."""
    plan, source = job.plan, job.source
    parts = plan.parts
    tables = {f"{name}.weight": name for name in (parts.embedding, parts.head) if plan.tables}
    checked = (parts.embedding, parts.head, parts.final_norm, parts.positions, parts.entry_norm)
    for name, spec in outside_blocks(job.account, plan, source).items():
        if name in tables:
            _store_table(job, tables[name])
        elif name in source.specs or name in source.extras:
            chunks = stored_rows(source, name, name.rpartition(".")[0] in checked)
            cast = (rows.to("cpu", spec.dtype) for rows in chunks)
            nbytes = nbytes_of({name: spec})
            job.output.add_rows(name, cast, spec.shape, nbytes)
        elif name.rpartition(".")[0] not in tables.values():
            job.output.add({name: job.model.get_buffer(name).to(spec.dtype)})


def _store_table(job: _Job, name: str) -> None:
    """Store an embedding or a head as 8-bit codes with one scale per row, in chunks of rows."""
    weight = job.model.get_submodule(name).get_parameter("weight")
    scales: list[Tensor] = []

    def packed() -> Iterator[Tensor]:
        for rounded in coded_rows(job.source, f"{name}.weight"):
            scales.append(rounded.scales.scale)
            yield pack(rounded.codes, EMBEDDING_BITS)

    like = packed_like(weight.shape[0], weight.shape[1], EMBEDDING_BITS)
    job.output.add_rows(f"{name}.weight", packed(), tuple(like.shape), like.nbytes)
    if scales:
        job.output.add({f"{name}.weight_scale": torch.cat(scales)})


def _to_store(block: Block, source: Source, account: Account) -> dict[str, Tensor]:
    """A block's tensors by full name, each in its stored dtype, on the CPU."""
    stored = {}
    for key, tensor in block.module.state_dict().items():
        name = f"{block.name}.{key}"
        dtype = account[name].dtype
        if dtype == torch.float64 and name in source.specs:
            # Blocks are loaded in float32: a tensor that no transform changed is stored as it was.
            ((_, original),) = source.tensors([name])
            if torch.equal(original.to(tensor.dtype), tensor.cpu()):
                tensor = original
        stored[name] = tensor.to("cpu", dtype)
    return stored


def _calibration_tokens(
    plan: Plan,
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
) -> Tokens | None:
    """The calibration tokens: the caller's data or the recipe's text; None if none are needed.

    Sequences are cut to the number of positions of the model.
    """
    recipe, text = plan.recipe, plan.recipe.calibration
    try:
        tokenizer = tokenizer or source.tokenizer()
    except CheckpointError as error:
        if recipe.calibrates and data is None:
            raise
        log.warning("%s; its files are copied as they are", error)
    if not recipe.calibrates:
        return None
    if data is not None:
        rows = model.get_submodule(plan.parts.embedding).get_parameter("weight").shape[0]
        return tokens_of(data, text, tokenizer, rows, positions_of(model))
    if tokenizer is None:
        raise CalibrationError(
            f"{source.name} has no tokenizer for calibration text; pass a tokenizer, or data"
        )
    windows = calibration_tokens(
        tokenizer,
        TextSource(text.source, text.split, text.text_column),
        text.samples,
        within_positions(model, text.sequence_length, "calibration sequences"),
        recipe.seed,
    )
    return Tokens((windows,))


def _identity(source: Source, recipe: Recipe, tokens: Tokens | None) -> RunKey:
    """The hashes of everything that the output's bytes depend on."""
    return RunKey(
        version=__version__,
        recipe=hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        model=source.fingerprint(),
        calibration=(tokens or Tokens(())).fingerprint(),
    )
