"""Quantize a checkpoint in one pass over the decoder blocks, with one block in memory at a time.

Quantizing a block needs only the block and the hidden states that enter it. The only transform that
spans blocks, the rotation of the residual stream, is fixed by the plan, and `load_block` folds it
into each block's weights. `_run` is the pass.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Source, unload_module
from ..checkpoint.writer import CheckpointWriter, Environment
from ..data.tokenizer import Processor
from ..data.tokens import Tokens
from ..plan.account import account_of, check_files, nbytes_of
from ..plan.plan import Plan
from ..plan.resolve import make_plan
from ..progress import Progress, silent
from ..recipe.recipe import Recipe
from ..report.model_card import model_card
from ..report.quantize_result import QuantizeResult
from ..runtime.device import resolve_device
from ..runtime.distributed import World
from ..runtime.memory import give_back, peak_memory, steady_heap
from ..runtime.process import default_modes
from .ends import embed_tokens, load_block
from .estimate import estimate_resources
from .hidden_states import HiddenStates
from .job import Job, dtype_note, output_config, run_key, shared_note, tokens_for
from .monitor import STREAM, BlockDone, OnBlock, PerplexityMonitor, Probe
from .quantize_block import quantize_block
from .round_trip import STREAM as ROUNDTRIP
from .round_trip import RoundTrip
from .shared_writer import SharedWriter
from .storing import block_tensors, store_ends

log = logging.getLogger("smoothq")


@default_modes()
def quantize_checkpoint(
    source: Source,
    recipe: Recipe,
    writer: CheckpointWriter,
    tokenizer: Processor | None = None,
    data: Any = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    max_memory: int | None = None,
    on_block: OnBlock | None = None,
    probe: Probe | None = None,
    check: bool = True,
    plan: Plan | None = None,
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
        plan: of the recipe, where it is known already.

    Returns: sizes, time and memory of the run.

    Raises:
        SmoothqError: the source, recipe, data or output is unfit. Raised before the first block is
            worked on if it can be detected by then.
    """
    start = time.perf_counter()
    device = resolve_device(device)
    world = World.join(device)
    model = source.skeleton()
    plan = plan or make_plan(model, recipe)
    side_files = source.side_files().with_tokenizer(tokenizer)
    tokens = tokens_for(plan, source, model, tokenizer, data)
    account = account_of(model, plan, source)
    count, featured = (0, ()) if tokens is None else (tokens.count, tokens.featured)
    needs = estimate_resources(plan, max_memory, writer.every, count, bool(featured))
    disk = needs.disk + side_files.nbytes + nbytes_of(source.extras)
    world.broadcast_from(lambda: writer.check(disk, source.paths))
    output = SharedWriter(writer, world)
    identity = run_key(source, recipe, tokens)
    config = output_config(source, plan)
    result = QuantizeResult(
        name=source.name,
        recipe=plan.recipe,
        bits=plan.bits,
        bytes_before=source.nbytes,
        bytes_after=nbytes_of(account),
        linear_bytes=plan.linear_bytes,
        seconds=0.0,
        peak_memory=peak_memory(),
        notes=(*plan.notes, *source.notes, *dtype_note(source, plan), *shared_note(plan, model)),
        repeated=True,
    )
    if world.broadcast_from(lambda: writer.is_finished(identity, config, side_files)):
        return result
    ours = (f"{writer.out.name}/", f"{writer.partial.name}/")
    left_out = [name for name in side_files.left_out if name not in ours]
    if world.is_main and left_out:
        log.info("not copied from %s: %s", source.name, ", ".join(left_out))
    with output, steady_heap():
        here = Environment.here(world.device.type, world.size)
        begun = world.broadcast_from(lambda: writer.begin(identity, here))
        roundtrip = RoundTrip(source, model, plan, account, world, featured) if check else None
        shown = progress or silent
        job = Job(source, plan, model, account, output, world, shown, on_block, roundtrip)
        _run(job, tokens, begun.blocks, writer.scratch, needs.states_on_disk, probe)
        card = model_card(result)
        final = world.broadcast_from(lambda: writer.assemble(config, side_files, card))
        world.broadcast_from(lambda: check_files(account, final))
        if roundtrip is not None:
            roundtrip.compare(final)
        world.broadcast_from(writer.place)
    seconds = time.perf_counter() - start
    return replace(result, seconds=seconds, peak_memory=peak_memory(), repeated=False)


@torch.no_grad()
def _run(
    job: Job,
    tokens: Tokens | None,
    finished: int,
    scratch: Path,
    states_on_disk: bool,
    probe: Probe | None,
) -> None:
    """Embed the calibration tokens, then quantize and store block after block.

    finished: number of blocks that the output contains already. scratch: directory for files of
    large stacks of experts and, if they are not to be in memory, of hidden states.
    """
    plan, output = job.plan, job.output
    streams = _streams(job, tokens, scratch if states_on_disk else None)
    probing = None
    if probe is not None:
        probing = PerplexityMonitor(probe, job.source, job.model, plan, job.world)
        streams[STREAM] = probing.stream
    if job.roundtrip is not None:
        streams[ROUNDTRIP] = job.roundtrip.stream
    if not finished:
        store_ends(job)
    for name, stream in streams.items() if finished else ():
        stream.replace(output.stream(name), finished)
    for index in range(finished, len(plan.blocks)):
        job.progress(index, len(plan.blocks), "load")
        block = load_block(job.source, job.model, plan, index, job.world.device, scratch)
        stage = partial(_enter_stage, job, index)
        quantize_block(
            block, plan, job.world, streams.get("quantized"), streams.get("float"), stage
        )
        perplexity = None if probing is None else probing.follow(block.module, index)
        stored = block_tensors(job, block)
        output.add(stored)
        if job.roundtrip is not None:
            job.roundtrip.follow(block, stored)
        del stored  # it would keep this block's codes while the next is quantized
        unload_module(block.module)
        output.block_done(index + 1, len(plan.blocks), streams)
        if job.on_block is not None:
            reference = None if probing is None else probing.float_perplexity
            job.on_block(BlockDone(index, len(plan.blocks), perplexity, reference))


def _streams(job: Job, tokens: Tokens | None, directory: Path | None) -> dict[str, HiddenStates]:
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


def _enter_stage(job: Job, index: int, stage: str) -> None:
    """Report the stage and return freed memory to the system, as a fragmented heap would grow."""
    give_back()
    job.progress(index, len(job.plan.blocks), stage)
