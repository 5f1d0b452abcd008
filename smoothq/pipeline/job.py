"""What a run works on, made before its first block, and what it stores of it."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from ..architectures.positions import positions_of, within_positions
from ..checkpoint.manifest import RunKey
from ..checkpoint.source import Source
from ..compat import tied_weights
from ..data.calibration import tokens_of
from ..data.images import Taken, chats_with_media
from ..data.text import TextSource, calibration_tokens
from ..data.tokenizer import Processor, text_part
from ..data.tokens import Tokens
from ..errors import CalibrationError, CheckpointError
from ..plan.account import Account
from ..plan.config import SmoothqConfig
from ..plan.plan import Plan
from ..progress import Progress
from ..recipe.recipe import Recipe
from ..runtime.distributed import World
from ..version import __version__
from .monitor import OnBlock
from .round_trip import RoundTrip
from .shared_writer import SharedWriter

log = logging.getLogger("smoothq")


@dataclass(frozen=True)
class Job:
    """What stays the same during a run.

    Attributes:
        source: the float checkpoint.
        plan: of the model.
        model: the float model on the meta device.
        account: shape and dtype of every tensor of the output.
        output: of the run.
        world: the ranks of the run.
        progress: called at each stage.
        on_block: called after each stored block, or None.
        roundtrip: the check of the written output, or None.
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


def tokens_for(
    plan: Plan,
    source: Source,
    model: PreTrainedModel,
    tokenizer: Processor | None,
    data: Any,
) -> Tokens | None:
    """The calibration tokens: the caller's data or the recipe's text; None if none are needed.

    Sequences of text are cut to the number of positions of the model. A local file of chats with
    images is read as such rows in `data` are.
    """
    recipe, text = plan.recipe, plan.recipe.calibration
    reader = None
    try:
        reader = source.tokenizer() if tokenizer is None else text_part(tokenizer)
    except CheckpointError as error:
        if recipe.calibrates and data is None:
            raise
        log.warning("%s; its files are copied as they are", error)
    if not recipe.calibrates:
        return None
    named = TextSource(text.source, text.split, text.text_column)
    if data is None:
        data = chats_with_media(named)
    if data is not None:
        rows = model.get_submodule(plan.parts.embedding).get_parameter("weight").shape[0]
        given = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
        processor = cache(source.processor if given is None else lambda: given)
        taken = Taken.of(model, source.config)
        return tokens_of(data, text, reader, rows, positions_of(model), taken, processor)
    if reader is None:
        raise CalibrationError(
            f"{source.name} has no tokenizer for calibration text; pass a tokenizer, or data"
        )
    windows = calibration_tokens(
        reader,
        named,
        text.samples,
        within_positions(model, text.sequence_length, "calibration sequences"),
        recipe.seed,
    )
    return Tokens((windows,))


def run_key(source: Source, recipe: Recipe, tokens: Tokens | None) -> RunKey:
    """The hashes of everything that the output's bytes depend on."""
    return RunKey(
        version=__version__,
        recipe=hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        model=source.fingerprint(),
        calibration=(tokens or Tokens(())).fingerprint(),
    )


def output_config(source: Source, plan: Plan) -> PretrainedConfig:
    """The output's config: the source's, with class, dtype and tying as they are stored."""
    config = copy.deepcopy(source.config)
    config.architectures = [plan.wiring.model_class.__name__]
    config.dtype = plan.stored_dtype
    if not plan.wiring.tied:
        for part in (config, config.get_text_config(decoder=True)):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    config.quantization_config = SmoothqConfig.of(plan, __version__)
    return config


def shared_note(plan: Plan, model: PreTrainedModel) -> Iterator[str]:
    """Yield a note if the model ties weights of several blocks."""
    shared = [name for name in tied_weights(model) if name.startswith(f"{plan.parts.layers}.")]
    if shared:
        yield (
            f"{len(shared)} tensors of blocks are shared with other blocks: each block gets a "
            f"copy, quantized with its own statistics, the first {shared[0]}"
        )


def dtype_note(source: Source, plan: Plan) -> Iterator[str]:
    """Yield a note if the source's config names another dtype than its tensors have."""
    named = source.config.dtype
    if isinstance(named, str):  # as `save_pretrained` leaves it in the config of a model in memory
        named = getattr(torch, named, named)
    if named is not None and plan.recipe.dtype == "auto" and plan.stored_dtype != named:
        yield f"its config says {named}, its tensors are {plan.stored_dtype}: stored as they are"
