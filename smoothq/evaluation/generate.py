"""Text that a model writes, streamed as it comes."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from ..architectures.positions import positions_of
from ..data.tokenizer import encode_prompt, in_one_line
from ..errors import CalibrationError
from ..runtime.offload import running_device

log = logging.getLogger("smoothq")


def stream_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    name: str,
    max_new_tokens: int = 128,
    *,
    chat: bool = True,
    sample: bool = False,
) -> None:
    """Print a model's continuation of a prompt as it comes.

    Args:
        model: a causal LM, float or quantized.
        tokenizer: of the model.
        prompt: text to continue.
        name: of the model, for messages.
        max_new_tokens: at most; fewer where the model has no more positions.
        chat: wrap the prompt in the tokenizer's chat template, if it has one.
        sample: instead of greedy.

    Raises:
        CalibrationError: for a prompt that the model has no positions for, or a model that predicts
            no tokens.
    """
    if not model.can_generate():
        raise CalibrationError(f"{type(model).__name__} predicts no tokens: {name} writes no text")
    rows = model.get_input_embeddings().weight.shape[0]
    inputs = encode_prompt(tokenizer, prompt, chat and bool(tokenizer.chat_template), rows)
    limit, length = positions_of(model), inputs["input_ids"].shape[1]
    if limit is not None and length >= limit:
        raise CalibrationError(
            f"the prompt has {length} tokens, and {name} has {limit} positions: shorten it"
        )
    if limit is not None and length + max_new_tokens > limit:
        max_new_tokens = limit - length
        log.warning("%d new tokens at most: the model has %d positions", max_new_tokens, limit)
    streamer: Any = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with in_one_line(f"{name} cannot generate"):  # its generation config may be damaged too
        model.generate(
            **inputs.to(running_device(model)),
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            streamer=streamer,
        )
