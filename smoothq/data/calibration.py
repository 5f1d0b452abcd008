"""Calibration data as callers hold them → tokens: arrays, lists, texts, batches, data sets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError
from .text import TEXT_COLUMNS, render_chat, tokenize
from .tokens import Tokens

log = logging.getLogger("smoothq")

_FORMS = (
    "give token ids (an int tensor, an array, a list of lists), texts, a datasets.Dataset, or "
    "batches with input_ids and attention_mask"
)


class TextSettings(Protocol):
    """How much of texts is taken, and from which column: a recipe's `Calibration`."""

    @property
    def samples(self) -> int:
        """Texts that are taken."""

    @property
    def sequence_length(self) -> int:
        """Tokens that are taken of each."""

    @property
    def text_column(self) -> str | None:
        """The column that holds them, or None for whichever is usual."""


def tokens_of(
    data: Any,
    settings: TextSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    longest: int | None,
) -> Tokens:
    """The tokens of calibration data in any of the forms that `quantize` takes.

    Token ids are taken as they are, each row a sequence, without those that an `attention_mask`
    hides; what is left of a row follows one another. Of texts, and of data that do not say how many
    they are, the first `samples` of the settings are taken, and of a text the first
    `sequence_length` tokens.
    vocabulary: ids lie below it. longest: tokens that a sequence is shortened to.

    Raises CalibrationError for all that are no token ids, and for none.
    """
    reader = _Reader(settings, tokenizer)
    rows = list(reader.sequences(data))
    if not rows:
        raise CalibrationError(f"data hold no sequence: {_FORMS}")
    if reader.full:
        log.warning("of the data the first %d samples are taken, as the recipe says", len(rows))
    for number, row in enumerate(rows):
        low, high = int(row.min()), int(row.max())
        if low < 0:
            raise CalibrationError(
                f"data: sequence {number} holds {low}, which is no token id (-100 is a label's "
                "mask): give input_ids, and hide tokens with an attention_mask"
            )
        if high >= vocabulary:
            raise CalibrationError(
                f"data: sequence {number} holds token {high}, beyond the model's {vocabulary}: "
                "give data made with its own tokenizer"
            )
    long = sum(len(row) > longest for row in rows) if longest is not None else 0
    if long:
        message = "%d of %d calibration sequences are shortened to the model's %d positions"
        log.warning(message, long, len(rows), longest)
    return Tokens.of(row[:longest] for row in rows)


@dataclass
class _Reader:
    """Reads one caller's data. texts: how many were read. full: more than the recipe takes came."""

    settings: TextSettings
    tokenizer: PreTrainedTokenizerBase | None
    texts: int = 0
    full: bool = False

    def sequences(self, data: Any) -> Iterator[Tensor]:
        """Every sequence, int64 (length,), one token or more."""
        if isinstance(data, np.ndarray) and data.dtype.kind in "OU":
            data = data.tolist()
        if isinstance(data, Mapping):
            yield from self._columns(data, "data")
        elif isinstance(data, Tensor | np.ndarray) or _is_row(data):
            yield from _ids(data, "data")
        elif isinstance(data, str | bytes) or hasattr(data, "columns") or not _has_items(data):
            raise CalibrationError(f"data is a {type(data).__name__}: {_FORMS}")
        else:
            endless = not isinstance(data, Sized)
            for number, item in enumerate(data):
                self.full |= endless and number == self.settings.samples
                if self.full:
                    return
                yield from self._item(item, f"item {number} of data")

    def _item(self, item: Any, where: str) -> Iterator[Tensor]:
        if isinstance(item, str):
            yield from self._text(item)
        elif isinstance(item, Mapping):
            yield from self._columns(item, where)
        elif isinstance(item, list | tuple) and item and isinstance(item[0], Mapping):
            yield from self._chat(item, where)
        elif isinstance(item, list | tuple) and any(
            isinstance(x, Tensor) and x.dim() for x in item
        ):
            raise CalibrationError(
                f"{where} is a {type(item).__name__} of tensors, which does not say what they are: "
                "give {'input_ids': ..., 'attention_mask': ...}"
            )
        else:
            yield from _ids(item, where)

    def _columns(self, columns: Mapping[str, Any], where: str) -> Iterator[Tensor]:
        """A row or a batch that names its columns: ids, with or without a mask, chats or texts."""
        if "input_ids" in columns:
            yield from _visible(columns["input_ids"], columns.get("attention_mask"), where)
            return
        wanted = (self.settings.text_column, "messages", *TEXT_COLUMNS)
        column = next(
            (columns[name] for name in wanted if name is not None and name in columns), None
        )
        documents = column if isinstance(column, list | tuple) else [column]
        if documents and isinstance(documents[0], Mapping):
            documents = [documents]
        for document in documents:
            if isinstance(document, str):
                yield from self._text(document)
            elif isinstance(document, list | tuple):
                yield from self._chat(document, where)
            else:
                raise CalibrationError(
                    f"{where} has {', '.join(map(repr, columns))}, and no input_ids, no text and "
                    "no messages among them: rename the column"
                )

    def _chat(self, messages: Any, where: str) -> Iterator[Tensor]:
        yield from self._text(render_chat(list(messages), where, self._known_tokenizer()))

    def _text(self, text: str) -> Iterator[Tensor]:
        """A text's first tokens; none of an empty one, of which running text has many."""
        self.full |= self.texts == self.settings.samples
        if self.full:
            return
        ids = tokenize(self._known_tokenizer(), [text])[: self.settings.sequence_length]
        if ids:
            self.texts += 1
            yield torch.tensor(ids)

    def _known_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise CalibrationError("data hold text, and there is no tokenizer: pass one, or tokens")
        return self.tokenizer


def _has_items(data: Any) -> bool:
    return isinstance(data, Iterable) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def _is_row(data: Any) -> bool:
    """Whether a list is one sequence of numbers."""
    return (
        isinstance(data, list | tuple)
        and bool(data)
        and np.isscalar(data[0])
        and (not isinstance(data[0], str | bytes))
    )


def _ids(values: Any, where: str) -> Iterator[Tensor]:
    """Token ids by sequence, int64 (length,)."""
    for row in _rows(values, where):
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise CalibrationError(f"{where} holds {row.dtype}, which are no token ids: {_FORMS}")
        yield row.to("cpu", torch.int64)


def _visible(values: Any, mask: Any, where: str) -> Iterator[Tensor]:
    """Token ids by sequence without those that a mask hides. mask: 1 or 0 a token, or None."""
    ids = list(_ids(values, where))
    if mask is None:
        yield from ids
        return
    masks = list(_rows(mask, f"the attention_mask of {where}"))
    if [len(row) for row in masks] != [len(row) for row in ids]:
        raise CalibrationError(f"{where}: attention_mask and input_ids differ in shape")
    for row, seen in zip(ids, masks, strict=True):
        if not bool(((seen == 0) | (seen == 1)).all()):
            raise CalibrationError(f"{where}: its attention_mask holds other numbers than 0 and 1")
        visible = row[seen.to("cpu", torch.bool)]
        if not len(visible):
            raise CalibrationError(
                f"{where}: the attention_mask hides a whole sequence; leave it out"
            )
        yield visible


def _rows(values: Any, where: str) -> Iterator[Tensor]:
    """The rows of an array of one or two dimensions, or of nested lists; none is empty."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        values = torch.from_numpy(values.astype(np.int64))
    elif isinstance(values, np.ndarray):
        values = values.tolist()
    nested = isinstance(values, list | tuple) and len(values) > 0
    if nested and isinstance(values[0], list | tuple | np.ndarray):
        for row in values:
            yield from _rows(row, where)
        return
    if isinstance(values, Tensor):
        row = values.detach()
    elif isinstance(values, list | tuple):
        try:
            row = torch.tensor(values)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CalibrationError(f"{where} is no row of token ids: {_FORMS}") from error
    else:
        raise CalibrationError(f"{where} is a {type(values).__name__}: {_FORMS}")
    if row.dim() not in (1, 2) or row.layout != torch.strided:
        raise CalibrationError(
            f"{where} has the shape {tuple(row.shape)}: sequences are (length,) or "
            "(samples, length)"
        )
    if not row.numel():
        raise CalibrationError(f"{where} is empty, of shape {tuple(row.shape)}: {_FORMS}")
    yield from row.reshape(-1, row.shape[-1])
