"""Loading and using tokenizers, with errors of damaged ones reported in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..errors import CalibrationError, CheckpointError, SmoothqError, first_line

Processor: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def load_tokenizer(
    directory: Path, name: str, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's directory.

    Args:
        directory: of the model.
        name: of the model, for messages.
        gguf_file: name of a GGUF file in the directory to take the tokenizer from.
        trust_remote_code: whether to run code beside the model. Without it nothing asks the user.

    Raises:
        CheckpointError: if it cannot be read.
    """
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with in_one_line(f"{name}: its tokenizer cannot be read"):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=trust_remote_code, **options
            )
        except ValueError as error:
            if trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise CheckpointError(
                f"{name}: its tokenizer has code of its own, which is run only where it is "
                "trusted: read it, and give trust_remote_code=True"
            ) from error
    return tokenizer


def load_processor(directory: Path, name: str, trust_remote_code: bool = False) -> ProcessorMixin:
    """Load the processor of images or sound and text of a model's directory.

    Args:
        directory: of the model.
        name: of the model, for messages.
        trust_remote_code: whether to run code beside the model. Without it nothing asks the user.

    Raises:
        CalibrationError: if there is none, or it cannot be loaded here.
    """
    try:
        loaded = AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a missing package, a damaged file, code of its own
        raise CalibrationError(
            f"{name}: its processor cannot be loaded for rows with images "
            f"({type(error).__name__}: {first_line(error)}): pass one as tokenizer, or batches "
            "that it made as data"
        ) from error
    if not isinstance(loaded, ProcessorMixin):
        raise CalibrationError(
            f"{name} has no processor for rows with images: pass one as tokenizer, or batches that "
            "it made as data"
        )
    return loaded


def text_part(tokenizer: Processor) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor of images or audio and text; a tokenizer itself."""
    if not isinstance(tokenizer, ProcessorMixin):
        return tokenizer
    part: PreTrainedTokenizerBase = tokenizer.tokenizer
    return part


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, rows: int
) -> BatchEncoding:
    """Tokenise a prompt for a model.

    Args:
        tokenizer: of the model.
        prompt: text.
        chat: whether to wrap the prompt as a user message in the tokenizer's chat template.
        rows: of the model's embedding; token ids must be below.

    Returns:
        `input_ids` and `attention_mask`, int64 (1, tokens).

    Raises:
        CheckpointError: if the tokenizer or its template fails, gives no token, or gives a token
            that the model does not have.
    """
    name = tokenizer.name_or_path or "the model"
    if chat:
        with in_one_line(f"{name}: its chat template cannot be used", "or go without (chat=False)"):
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
    else:
        with in_one_line(f"{name}: its tokenizer cannot encode the prompt"):
            encoded = tokenizer(prompt, return_tensors="pt")
    assert isinstance(encoded, BatchEncoding)
    if not encoded["input_ids"].numel():
        raise CheckpointError(f"{name}: its tokenizer makes no token of the prompt; give a longer")
    check_tokens(encoded["input_ids"], rows, name)
    return encoded


def check_tokens(tokens: torch.Tensor, rows: int, name: str) -> None:
    """Check that a model's embedding has a row for every token.

    Args:
        tokens: token ids, int64, at least one.
        rows: of the embedding.
        name: of the model, for messages.

    Raises:
        CheckpointError: for a token id of `rows` or above.
    """
    highest = int(tokens.max())
    if highest >= rows:
        raise CheckpointError(
            f"{name}: its tokenizer makes token {highest} and the model has {rows}; the two are "
            "not of one model, or a file of the tokenizer is damaged"
        )


@contextmanager
def in_one_line(what: str, advice: str = "or get its files again") -> Iterator[None]:
    """Context that turns exceptions of tokenizer libraries into a CheckpointError of one line.

    Args:
        what: beginning of the message: what failed.
        advice: end of the message: what else to do than to repair the tokenizer.
    """
    try:
        yield
    except SmoothqError:
        raise
    except BaseException as error:
        # The Rust library panics on some files: PanicException derives from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{what}: {type(error).__name__}: {first_line(error)}; mend it, {advice}"
        ) from error
