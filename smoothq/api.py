"""Quantize a model from Python; the command line calls this."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from .checkpoint.open import open_source
from .checkpoint.source import Source, text_tokenizer
from .checkpoint.writer import CheckpointWriter
from .data.text import TextSource, evaluation_tokens
from .data.tokenizer import Processor
from .errors import RecipeError, StoppedError
from .evaluation.perplexity import windows_of
from .export.compressed_tensors import export_compressed_tensors
from .export.model_free import MEMORY, quantize_model_free
from .pipeline.estimate import estimate_resources, estimate_time
from .pipeline.monitor import BlockDone, OnBlock, Probe
from .pipeline.run import quantize_checkpoint
from .plan.plan import Plan
from .plan.portability import cost_of, make_exportable, refuse_blockers
from .plan.resolve import resolve
from .plan.wiring import Wiring
from .progress import Progress
from .recipe.presets import recipe_of
from .recipe.recipe import Recipe
from .report.figures import needs_text
from .report.quantize_result import QuantizeResult
from .report.results import duration_text
from .runtime.device import resolve_device
from .runtime.distributed import World
from .runtime.memory import parse_bytes

log = logging.getLogger("smoothq")

PROBE_WINDOWS = (4, 512)  # windows, and tokens of each, that a probe of a text measures


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    tokenizer: Processor | None = None,
    data: Any = None,
    output: str | Path | None = None,
    *,
    format: Literal["smoothq", "compressed-tensors"] = "smoothq",
    servable: bool = False,
    gguf_file: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    memory: Literal["fast", "low"] = "fast",
    overwrite: bool = False,
    resume: bool | None = None,
    checkpoint_every: int = 1,
    max_memory: int | str | None = None,
    progress: Progress | None = None,
    on_block: OnBlock | None = None,
    probe: Probe | int | None = None,
    probe_text: str | None = None,
    stop_above: float | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    model_free: bool = False,
) -> Any:
    """Quantize a decoder. Returns the model, or with `output` a QuantizeResult.

    With `output` nothing is loaded: `result.load()` does it. Of several processes that a launcher
    started, all must call this: they share the work, and the first writes.

    Args:
        model: a directory, a hub id, or a model in memory (which is left as it is; compiled or in
            data parallel is taken for what it wraps). Of one with vision or audio towers the text
            model is quantized, and the rest stored as it is.
        recipe: a preset's name (`"w4a8"`, in upper or lower case), the path of a YAML file, a
            mapping of a Recipe's fields, or a Recipe.
        tokenizer: in place of the model's; or a processor, whose files all go along.
        data: in place of the recipe's text. Token ids: an int tensor or array, (samples, length) or
            (length,), or lists of them, of any lengths. Texts: a list of strings or of chats. A
            `datasets.Dataset` or any iterable of rows or batches that name their columns:
            `input_ids`, with an `attention_mask` if some tokens are not to count, `messages` or
            `text`. Messages may have images, and batches what a processor made of images. Ids and
            such batches are taken all, and of texts as many and as long as the recipe says.
        output: the directory that is written. One that is there, whole and of the same run, stays
            as it is.
        format: `compressed-tensors` writes what vLLM reads in place of our own format.
        servable: leave out of the recipe what only smoothq can run.
        gguf_file: a GGUF file inside the model's directory, which transformers reads.
        device: to work on; `auto` is a GPU where there is one.
        dtype: of all that stays float in the loaded model.
        memory: `low` holds 4-bit weights of the loaded model packed alone.
        overwrite: replace an output that is there.
        resume: True demands an unfinished run to go on with, False begins anew, None goes on where
            there is one.
        checkpoint_every: blocks between two states to go on from.
        max_memory: bytes that the process may take, or text such as `8GB`.
        progress: called with (block, blocks, stage).
        on_block: called with a `BlockDone` after each stored block. An exception from it stops the
            run, and the same call goes on with an output.
        probe: tokens on which perplexity is measured every few blocks, or a number: every so many
            blocks on `probe_text`. What is measured is passed to `on_block`.
        probe_text: a text as for calibration; without it the calibration's own.
        stop_above: stop where the probe's perplexity is over so many times the float model's.
        check: load the output before it is placed and compare it with what was computed.
        trust_remote_code: run model code that lies beside the weights, as transformers does with
            this flag. Without it such a model is refused, and nothing asks.
        model_free: quantize the stored tensors without the model's class, which may be newer than
            transformers: linears are told by name and shape and rounded to nearest, in less than
            2 GB of memory, and the output is in the compressed-tensors format whatever `format`
            says. Needs an output, and takes no text; nothing is loaded to check.

    Raises SmoothqError (RecipeError, UnsupportedModelError, CalibrationError, NumericsError,
    CheckpointError, DeviceError or StoppedError) with one line on what was wrong and what to do.
    """
    recipe = recipe_of(recipe)
    _check_options(format, memory, output, probe, stop_above)
    if isinstance(max_memory, str):
        max_memory = parse_bytes(max_memory)
    device = resolve_device(device)
    if model_free:
        given = {
            "tokenizer": tokenizer,
            "data": data,
            "gguf_file": gguf_file,
            "on_block": on_block,
            "probe": probe,
        }
        _refuse_for_model_free(model, output, given, max_memory)
        assert output is not None
        writer = CheckpointWriter(Path(output), overwrite, resume=resume)
        result = quantize_model_free(str(model), recipe, writer, torch.device(device), progress)
        return replace(result, path=Path(output), _dtype=dtype, _memory=memory)
    world = World.join(device)
    with ExitStack() as stack:
        if output is None:
            scratch = stack.enter_context(TemporaryDirectory(prefix="smoothq-"))
        directory = Path(scratch) / "model" if output is None else Path(output)
        writer, exporter = _writers(directory, format, overwrite, resume, checkpoint_every)
        for target in filter(None, (exporter, writer)):
            world.broadcast_from(partial(target.check, 0))
        source = open_source(model, tokenizer, gguf_file, trust_remote_code)
        for target in filter(None, (writer, exporter)):
            world.broadcast_from(partial(target.check, 0, source.paths))
        plan = None
        if servable or exporter is not None or log.isEnabledFor(logging.INFO):
            recipe, plan = planned(
                source.skeleton(), source.name, recipe, format, servable, world.is_main
            )
            if world.is_main:
                _log_estimate(plan, world, max_memory, checkpoint_every)
        if isinstance(probe, int):
            probe = Probe(_probe_tokens(source, probe_text or recipe.calibration.source), probe)
        result = quantize_checkpoint(
            source,
            recipe,
            writer,
            tokenizer,
            data,
            device=device,
            progress=progress,
            max_memory=max_memory,
            on_block=_watched(on_block, stop_above, world),
            probe=probe,
            check=check,
            plan=plan,
        )
        if world.is_main and exporter is not None and writer.out.is_dir():
            # It is gone where the export was finished before.
            exported = export_compressed_tensors(
                writer.out, exporter, trust_remote_code=source.trusts_code
            )
            result = replace(result, export=exported)
            shutil.rmtree(writer.out)
        result = replace(
            result,
            path=directory,
            _dtype=dtype,
            _memory=memory,
            _trusts_code=source.trusts_code,
        )
        return result if output is not None else _loaded(result)


def _loaded(result: QuantizeResult) -> Any:
    """The model of a result whose directory is about to go; logs its notes."""
    for note in result.notes:
        log.warning("%s: %s", result.name, note)
    return result.load()


def _log_estimate(plan: Plan, world: World, max_memory: int | None, every: int) -> None:
    """Log how long a run will take, and how much memory and disk."""
    if log.isEnabledFor(logging.INFO):
        seconds = estimate_time(plan, world.device).seconds
        needs = estimate_resources(plan, max_memory, every)
        log.info("about %s on this machine; %s", duration_text(seconds), needs_text(needs))


def _check_options(
    format: str, memory: str, output: object, probe: object, stop_above: float | None
) -> None:
    """Raise RecipeError for options of `quantize` that are none or exclude each other."""
    if format not in ("smoothq", "compressed-tensors"):
        raise RecipeError(f"format '{format}' is none: take smoothq or compressed-tensors")
    if memory not in ("fast", "low"):
        raise RecipeError(f"memory '{memory}' is none: take fast or low")
    if stop_above is not None and probe is None:
        raise RecipeError("stop_above needs a probe to measure with")
    if output is None and format != "smoothq":
        raise RecipeError(f"format {format} is written, not loaded: name an output")


def _refuse_for_model_free(
    model: object, output: object, given: Mapping[str, object], max_memory: int | None
) -> None:
    """Raise RecipeError for arguments of `quantize` that need a model's class.

    given: those arguments, by name; None where they were not given.
    """
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise RecipeError(
            f"model_free knows no class that could take {', '.join(named)}: leave that out, or "
            "model_free=True"
        )
    if not isinstance(model, str | Path):
        raise RecipeError("model_free reads stored tensors: give a directory or a hub id")
    if output is None:
        raise RecipeError("model_free writes what it makes, and loads nothing: name an output")
    if max_memory is not None and max_memory < MEMORY:
        raise RecipeError(f"model_free takes up to {MEMORY / 1e9:g} GB: raise max_memory to that")


def planned(
    empty: PreTrainedModel,
    name: str,
    recipe: Recipe,
    format: str = "smoothq",
    servable: bool = False,
    is_main: bool = True,
) -> tuple[Recipe, Plan]:
    """The recipe that will be run, and its plan.

    Args:
        empty: the model's skeleton.
        name: the model's, for messages.
        recipe: as it was asked for.
        format: that the output will have; what it cannot hold is a RecipeError.
        servable: leave out of the recipe what only smoothq can run.
        is_main: whether this process is the main one, which logs what was left out.
    """
    wiring = Wiring.of(empty)
    if servable:
        wanted = recipe
        recipe, changes = make_exportable(empty, wanted, wiring)
        if is_main and changes:
            log.info("servable: %s; %s", "; ".join(changes), cost_of(wanted))
    plan = resolve(wiring, recipe)
    if format != "smoothq":
        refuse_blockers(empty, plan, name, format)
    return recipe, plan


def _writers(
    output: Path, format: str, overwrite: bool, resume: bool | None, every: int
) -> tuple[CheckpointWriter, CheckpointWriter | None]:
    """The writer of our own format, and of the format that is asked for in its place, or None."""
    if format == "smoothq":
        return CheckpointWriter(output, overwrite, resume=resume, every=every), None
    exporter = CheckpointWriter(output, overwrite, resume=False)
    beside = exporter.beside("smoothq")
    return CheckpointWriter(
        beside, overwrite, resume=resume, every=every, export=exporter
    ), exporter


def _probe_tokens(source: Source, text: str) -> torch.Tensor:
    """The first windows of an evaluation text, int64 (windows, length): fewer if it is short."""
    windows, length = PROBE_WINDOWS
    tokens = evaluation_tokens(text_tokenizer(source), TextSource(text))
    return windows_of(tokens, length, windows)


def _watched(on_block: OnBlock | None, stop_above: float | None, world: World) -> OnBlock:
    """Log what was measured after a block, stop where it is too much, and call the caller's own."""

    def watch(done: BlockDone) -> None:
        if done.perplexity is not None and done.float_perplexity is not None:
            ratio = done.perplexity / done.float_perplexity
            text = f"{done.perplexity:.3f}, {ratio:.3f} times float"
            if world.is_main:
                log.info("block %d: perplexity %s", done.block, text)
            if stop_above is not None and ratio > stop_above:
                raise StoppedError(
                    f"after block {done.block} perplexity is {done.perplexity:.2f}, {ratio:.3f} "
                    f"times the float model's, over {stop_above:g}"
                )
        if on_block is not None:
            on_block(done)

    return watch
