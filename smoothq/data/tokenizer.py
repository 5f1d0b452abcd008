"""Tokenizers as they are used here: one that is damaged is answered in one line, by its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from ..errors import CheckpointError, SmoothqError, first_line


def load_tokenizer(
    directory: Path, name: str, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory. Raises CheckpointError where it cannot be read."""
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with in_one_line(f"{name}: its tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, **options)
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, rows: int
) -> BatchEncoding:
    """A prompt as a model is given it, one sequence.

    chat: as a message in the tokenizer's chat template. rows: of the model's embedding. Raises
    CheckpointError for a tokenizer or a template that fails, for no token at all, and for a token
    that the model does not have.
    """
    name = tokenizer.name_or_path or "the model"
    if chat:
        with in_one_line(f"{name}: its chat template cannot be used", "or go without (--no-chat)"):
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
    """Raise CheckpointError for a token that an embedding of so many rows does not have."""
    highest = int(tokens.max())
    if highest >= rows:
        raise CheckpointError(
            f"{name}: its tokenizer makes token {highest} and the model has {rows}; the two are "
            "not of one model, or a file of the tokenizer is damaged"
        )


@contextmanager
def in_one_line(what: str, advice: str = "or get its files again") -> Iterator[None]:
    """Turn whatever a library of tokenizers raises into a CheckpointError of one line."""
    try:
        yield
    except SmoothqError:
        raise
    except BaseException as error:
        # The tokenizers library panics on some files, which to Python is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{what}: {type(error).__name__}: {first_line(error)}; mend it, {advice}"
        ) from error
