"""The whole job: one pass over the decoder blocks, one block in memory at a time.

What is done to a block needs only the block and the hidden states that enter it, because the one
global choice, the rotation of the residual stream, is made before the first block: `load_block`
brings a block in with that rotation in its weights. Read `_run` and `_quantize_block`; the rest of
this file is what they call.
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
from ..checkpoint.source import Source, skeleton, unload_module
from ..checkpoint.writer import CheckpointWriter, Environment
from ..data.calibration import tokens_of
from ..data.text import TextSource, calibration_tokens
from ..data.tokens import Tokens
from ..errors import CalibrationError, CheckpointError
from ..modules import InputQuantizer, SequenceContext
from ..modules.quantized_embedding import EMBEDDING_BITS
from ..plan.account import Account, account_of, nbytes_of
from ..plan.config import SmoothqConfig
from ..plan.install import install_inputs, install_linear
from ..plan.plan import Plan, SitePlan
from ..plan.resolve import make_plan
from ..progress import Progress, Stage, silent
from ..recipe.recipe import Recipe
from ..report.figures import model_card
from ..report.results import QuantizeResult
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
from .ends import (
    Block,
    coded_rows,
    embed_tokens,
    load_block,
    stored_rows,
)
from .estimate import estimate_resources
from .hidden_states import HiddenStates
from .monitor import (
    STREAM,
    BlockDone,
    PerplexityMonitor,
    Probe,
)
from .observers import SecondMoment
from .round_trip import STREAM as ROUNDTRIP
from .round_trip import RoundTrip
from .shared_writer import SharedWriter

log = logging.getLogger("smoothq")

HESSIAN_BYTES = 1 << 30  # of experts' Hessians that are held at once


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
    """Quantize a source into a checkpoint directory, or go on with what the writer has of it.

    data: what to calibrate on, as for `quantize`; without it the recipe's text is read.
    max_memory: bytes that the process may take. on_block: called when a block is stored; what it
    raises stops the run, which can be gone on with. probe: what is measured for it on the way.
    check: load the output again before it is placed and compare it with what was computed. Of
    several processes that a launcher started, all must call this: they share the work, and the
    first writes.
    An output that is there, whole and made of just this, stays as it is.
    Raises SmoothqError for whatever cannot be done, before any work where that can be known.
    """
    start = time.perf_counter()
    check_device(device)
    world = World.join(device)
    model = skeleton(source)
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
    """The config of the output: the source's, true to what is stored."""
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
    """A line where a config names another dtype than the tensors have."""
    named = source.config.dtype
    if named is not None and plan.recipe.dtype == "auto" and plan.stored_dtype != named:
        yield f"its config says {named}, its tensors are {plan.stored_dtype}: stored as they are"


@dataclass(frozen=True)
class _Job:
    """What a pass works with: where weights come from, what is done, and where they go.

    account: all that the output will hold.
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
    """The pass: what enters the blocks, each block, and what is stored of them.

    finished: blocks that the output has already. directory: where hidden states are held in files,
    or None.
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
            usual = None if probing is None else probing.float_perplexity
            job.on_block(BlockDone(index, len(plan.blocks), perplexity, usual))


def _enter_stage(job: _Job, index: int, stage: str) -> None:
    """Say so, and give back what the stage before freed: holes of the heap would add up."""
    give_back()
    job.progress(index, len(job.plan.blocks), stage)


def _quantize_block(
    block: Block,
    job: _Job,
    stream: HiddenStates | None,
    unquantized: HiddenStates | None,
    stage: Stage,
) -> None:
    """Transform and quantize one block, and move the hidden states past it.

    unquantized: the hidden states of the float model, where the recipe tunes blocks towards them.
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
    """Smooth a float block and rotate inside it as its plan has it; its function stays the same.

    stream: what enters the block; smoothing needs it. advance: where the block is smoothed, move
    the stream past the float block on the way.
    """
    recipe, graph = plan.recipe, block.plan.graph
    if recipe.smoothing is not None and stream is not None:
        if stage is not None:
            stage("smooth")
        _smooth(block, plan, stream, advance)
    if graph.value_output is not None and block.plan.value_rotation is not None:
        rotate_value_output(block.module, graph.value_output, block.plan.value_rotation)


def _smooth(block: Block, plan: Plan, stream: HiddenStates, advance: bool) -> None:
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
    block: Block,
    job: _Job,
    plans: list[SitePlan],
    inputs: dict[str, InputQuantizer],
    stream: HiddenStates | None,
) -> dict[str, Tensor]:
    """Calibrate sites that run side by side, round their weights, and put quantized linears in.

    Of several processes each rounds its share of the matrices. Returns, by module, what the codes
    of its weight were rounded from, where the recipe tunes them.
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
        seen: dict[str, SecondMoment] = {}
        if stream is not None and recipe.weights.rounding == "gptq":
            watched = {token_group.modules[0]: token_group.input for token_group in together}
            seen = stream.hessians(block.module, block.index, watched)
        factors = _Factors(block, seen, recipe)
        work = [(token_group, name) for token_group in together for name in token_group.modules]
        for turn in (work[i : i + world.size] for i in range(0, len(work), world.size)):
            own = world.raise_together(partial(_round_own, block, turn, factors, job))
            for owner, (token_group, name) in enumerate(turn):
                rounded = world.broadcast_from(lambda own=own: own, owner)  # type: ignore[misc]
                assert rounded is not None
                rounded = rounded.to(world.device)
                linear = block.module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                quantized = install_linear(block.module, name, token_group.plan, token_group.input)
                quantized.set_weight(rounded, linear.bias)
                if rounded.unrounded is not None:
                    unrounded[name] = rounded.unrounded
            del own, rounded
    return unrounded


def _round_own(
    block: Block, turn: list[tuple[_TokenGroup, str]], factors: _Factors, job: _Job
) -> QuantizedWeight | None:
    """What this process rounds of a turn, in which every process has one matrix at most."""
    if job.world.rank >= len(turn):
        return None
    token_group, name = turn[job.world.rank]
    return _round(block, token_group, name, factors.of(token_group), job.plan.recipe)


class _Factors:
    """What GPTQ needs for each of some lanes, made when it is asked for; one at a time is held."""

    def __init__(self, block: Block, seen: dict[str, SecondMoment], recipe: Recipe) -> None:
        """seen: the Hessian of each lane by its first module; empty where GPTQ does not round."""
        self._block, self._seen, self._recipe = block, seen, recipe
        self._held: tuple[str, Factor | None] = ("", None)

    def of(self, token_group: _TokenGroup) -> Factor | None:
        """A lane's; None where its matrices are rounded to nearest."""
        name = token_group.modules[0]
        if self._held[0] != name:
            self._held = ("", None)
            moment = self._seen.pop(name, None)
            factor = (
                None if moment is None else _factor(self._block, token_group, moment, self._recipe)
            )
            self._held = (name, factor)
        return self._held[1]


@dataclass(frozen=True)
class _TokenGroup:
    """Modules of a site that the same tokens reach."""

    plan: SitePlan
    modules: tuple[str, ...]
    input: InputQuantizer

    @property
    def routed(self) -> bool:
        """Whether a router decides which tokens these are."""
        readers = self.plan.site.readers
        return any(reader.routed for reader in readers if reader.module in self.modules)


def _in_memory(token_groups: list[_TokenGroup]) -> Iterator[list[_TokenGroup]]:
    """Lanes in runs whose Hessians are held at once."""
    run: list[_TokenGroup] = []
    for token_group in token_groups:
        if (
            run
            and 8 * sum(each.input.spec.width**2 for each in [*run, token_group]) > HESSIAN_BYTES
        ):
            yield run
            run = []
        run.append(token_group)
    yield run


def _factor(
    block: Block, token_group: _TokenGroup, seen: SecondMoment, recipe: Recipe
) -> Factor | None:
    """What GPTQ needs for a lane; None for an expert that too few tokens reached."""
    site = token_group.modules[0] if token_group.routed else token_group.plan.site.name
    where = f"{block.name}, {site}"
    if token_group.routed and seen.tokens < recipe.gptq.least_tokens:
        log.warning(
            "%s: %d tokens of the calibration text reached this expert; rounded to nearest",
            where,
            seen.tokens,
        )
        return None
    return factorise(seen.result(), recipe.gptq, where)


def _round(
    block: Block, token_group: _TokenGroup, name: str, factor: Factor | None, recipe: Recipe
) -> QuantizedWeight:
    """The weight of one linear of a lane, rounded."""
    linear = block.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    grid = token_group.plan.modules[name].grid
    if factor is None:
        rounded = round_to_nearest(linear.weight, grid)
    else:
        rounded = gptq(linear.weight, factor, grid, recipe.gptq.block_size)
    return rounded if recipe.tuning is not None else replace(rounded, unrounded=None)


def _streams(job: _Job, tokens: Tokens | None, directory: Path | None) -> dict[str, HiddenStates]:
    """The hidden states: `quantized`, which will see the quantized blocks, and, where the recipe
    tunes blocks towards the float model, `float`; none without tokens.
    """
    if tokens is None:
        return {}
    batches = tokens.micro_batches
    entered = embed_tokens(job.source, job.model, job.plan, batches, job.world, directory)
    streams = {"quantized": entered}
    if job.plan.recipe.tuning is not None:
        streams["float"] = entered.copy()
    return streams


def _store_ends(job: _Job) -> None:
    """Store all that is not in a block: embedding, head, positions, norms, towers, and extras."""
    plan, source = job.plan, job.source
    parts = plan.parts
    tables = {f"{name}.weight": name for name in (parts.embedding, parts.head) if plan.tables}
    checked = (parts.embedding, parts.head, parts.final_norm, parts.positions, parts.entry_norm)
    for name, spec in job.account.items():
        if name.startswith(f"{parts.layers}.") and name not in source.extras:
            continue
        if name in tables:
            _store_table(job, tables[name])
        elif name in source.specs or name in source.extras:
            rows = stored_rows(source, name, name.rpartition(".")[0] in checked)
            cast = (each.to("cpu", spec.dtype) for each in rows)
            nbytes = nbytes_of({name: spec})
            job.output.add_rows(name, cast, spec.shape, nbytes)
        elif name.rpartition(".")[0] not in tables.values():
            job.output.add({name: job.model.get_buffer(name).to(spec.dtype)})


def _store_table(job: _Job, name: str) -> None:
    """Store an embedding or a head as codes with a scale a row, row by row."""
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
    """A block's tensors by full name, each in the dtype of the account."""
    stored = {}
    for key, tensor in block.module.state_dict().items():
        name = f"{block.name}.{key}"
        dtype = account[name].dtype
        if dtype == torch.float64 and name in source.specs:
            # Blocks are worked on in float32: what no transform touched keeps all its digits.
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
    """What to calibrate on: the caller's data, or the recipe's text; no longer than positions."""
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
    """What the bytes of a checkpoint follow from, by hash."""
    return RunKey(
        version=__version__,
        recipe=hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        model=source.fingerprint(),
        calibration=(tokens or Tokens(())).fingerprint(),
    )
