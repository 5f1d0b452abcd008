"""Tokenizers as they are used here: one that is damaged is answered in one line, by its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import CheckpointError
from .manifest import first_line


def load_tokenizer(
    directory: Path, name: str, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory. Raises CheckpointError where it cannot be read."""
    with _telling(f"{name}: its tokenizer cannot be read"):
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, **options)
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, rows: int, **options: Any) -> Any:
    """What a tokenizer makes of a text.

    rows: of the model's embedding. Raises CheckpointError for a tokenizer that fails, and for a
    token that the model does not have.
    """
    return _checked(tokenizer, rows, lambda: tokenizer(text, **options), "cannot encode text")


def chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], rows: int, **options: Any
) -> Any:
    """What a tokenizer's chat template makes of messages; raises as `encoded` does."""
    return _checked(
        tokenizer,
        rows,
        lambda: tokenizer.apply_chat_template(messages, return_dict=True, **options),
        "has a chat template that cannot be used",
    )


def _checked(
    tokenizer: PreTrainedTokenizerBase, rows: int, encode: Callable[[], Any], what: str
) -> Any:
    name = tokenizer.name_or_path or "the model"
    with _telling(f"{name}: its tokenizer {what}"):
        found = encode()
        highest = int(max(found["input_ids"].flatten(), default=0))
    if highest >= rows:
        raise CheckpointError(
            f"{name}: its tokenizer makes token {highest}, the model has {rows}; are they of one "
            "model?"
        )
    return found


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # The tokenizers library panics on some files, which Python sees as no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{what}: {type(error).__name__}: {first_line(error)}; get its files again"
        ) from error
