"""The Python door: quantize a model, get a quantized model."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint.source import open_source
from .checkpoint.writer import CheckpointWriter
from .pipeline.monitor import Probe
from .pipeline.run import OnBlock, quantize_checkpoint
from .progress import Progress
from .recipe.recipe import Recipe
from .runtime.process import build_lock, default_modes

log = logging.getLogger("smoothq")


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    output: str | Path | None = None,
    *,
    gguf_file: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    overwrite: bool = False,
    resume: bool | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    on_block: OnBlock | None = None,
    probe: Probe | None = None,
    check: bool = True,
) -> PreTrainedModel:
    """Quantize a causal LM and return it, ready to run.

    model: a directory, a hub id, or a model in memory (which is left as it is; compiled or in data
    parallel is taken for what it wraps). data: in place of the recipe's text. Token ids: an int
    tensor or array, (samples, length) or (length,), or lists of them, of any lengths. Texts: a list
    of strings or of chats. A `datasets.Dataset` or any iterable of rows or batches that name their
    columns: `input_ids`, with an `attention_mask` if some tokens are not to count, `messages` or
    `text`. Ids are taken all, and of texts as many and as long as the recipe says. output: where
    the checkpoint goes; without it a temporary directory serves; one that is there, whole and made
    of just this, is loaded as it is. dtype: of everything that stays float in the returned model.
    resume: True demands an unfinished run to go on with, False begins anew, None goes on where
    there is one. max_memory: bytes that the process may take on the way.
    on_block: called with a `BlockDone` when a block is stored; what it raises stops the run, and
    with an output the same call goes on. probe: perplexity on some tokens every few blocks, for it.
    check: load the output before it is placed and compare it with what was computed.

    Raises SmoothqError (RecipeError, UnsupportedModelError, CalibrationError, NumericsError,
    CheckpointError or DeviceError) with one line on what was wrong and what to do.
    """
    source = open_source(model, tokenizer, gguf_file)

    def run(directory: Path) -> Any:
        writer = CheckpointWriter(directory, overwrite, resume=resume)
        quantize_checkpoint(
            *(source, recipe, writer, tokenizer, data),
            device=device,
            progress=progress,
            max_memory=max_memory,
            on_block=on_block,
            probe=probe,
            check=check,
        )
        for note in source.notes:
            log.warning("%s: %s", source.name, note)
        with build_lock, default_modes():
            return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)

    if output is not None:
        return run(Path(output))  # type: ignore[no-any-return]
    with tempfile.TemporaryDirectory(prefix="smoothq-") as directory:
        return run(Path(directory) / "model")  # type: ignore[no-any-return]
