"""Converts calibration data in memory to tokens: arrays, lists, texts, batches, data sets.

Rows with images go through the model's processor; see `images`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import CalibrationError
from .images import ProcessorOf, Taken, chat_batch, featured_batches, has_media, is_featured
from .text import TEXT_COLUMNS, render_chat, tokenize
from .tokens import Batch, Tokens

log = logging.getLogger("smoothq")

TEXT = Taken("the model", frozenset(), None)  # what a model takes that reads text alone

_FORMS = (
    "give token ids (an int tensor, an array, a list of lists), texts, a datasets.Dataset, or "
    "batches with input_ids and attention_mask, and what a processor made of images"
)


class TextSettings(Protocol):
    """How many texts and tokens to take, and from which column; a recipe's `Calibration` is one."""

    @property
    def samples(self) -> int:
        """Number of texts to take."""

    @property
    def sequence_length(self) -> int:
        """Number of tokens to take of each text."""

    @property
    def text_column(self) -> str | None:
        """The column of texts or chats; None stands for the first of `TEXT_COLUMNS` that exists."""


def tokens_of(
    data: Any,
    settings: TextSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    longest: int | None,
    taken: Taken = TEXT,
    processor: ProcessorOf | None = None,
) -> Tokens:
    """Convert calibration data, in any form that `quantize` accepts, to tokens.

    Rows of token ids become sequences as they are, without the tokens that an `attention_mask`
    hides. Of texts, and of iterables without a length, the first `settings.samples` are taken; a
    text is cut to `settings.sequence_length` tokens. Chats with images count as texts and are taken
    whole, as are batches with what a processor made of images.

    Args:
        data: token ids (int tensor or array, (length,) or (samples, length); nested lists), texts,
            chats, a datasets.Dataset, or batches with `input_ids` and `attention_mask`.
        settings: how much of texts to take.
        tokenizer: for texts and chats; not needed for token ids.
        vocabulary: number of token ids of the model; every id must be below.
        longest: tokens to which a longer sequence is cut, with a warning; None for no limit.
        taken: what the model takes beside token ids.
        processor: gives the model's processor, for chats with images.

    Returns:
        The sequences, on the CPU.

    Raises:
        CalibrationError: for data that are no token ids or texts, for empty data, and for features
            that the model does not take.
    """
    reader = _Reader(settings, tokenizer, taken, processor)
    sequences = list(reader.sequences(data))
    if not sequences:
        raise CalibrationError(f"data hold no sequence: {_FORMS}")
    if reader.full:
        log.warning(
            "of the data the first %d samples are taken, as the recipe says", len(sequences)
        )
    for number, sequence in enumerate(sequences):
        row = sequence.tokens if isinstance(sequence, Batch) else sequence
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
    featured = [sequence for sequence in sequences if isinstance(sequence, Batch)]
    for batch in featured:
        if longest is not None and batch.tokens.shape[1] > longest:
            raise CalibrationError(
                f"{batch.where} has {batch.tokens.shape[1]} tokens with its images, the model "
                f"{longest} positions: give smaller images or less text"
            )
    rows = [sequence for sequence in sequences if not isinstance(sequence, Batch)]
    long = sum(len(row) > longest for row in rows) if longest is not None else 0
    if long:
        message = "%d of %d calibration sequences are shortened to the model's %d positions"
        log.warning(message, long, len(rows), longest)
    return Tokens.of((row[:longest] for row in rows), featured)


@dataclass
class _Reader:
    """Reads calibration data, and counts.

    texts: number of texts read. full: whether the data hold more than the settings ask for.
    """

    settings: TextSettings
    tokenizer: PreTrainedTokenizerBase | None
    taken: Taken
    processor: ProcessorOf | None
    texts: int = 0
    full: bool = False

    def sequences(self, data: Any) -> Iterator[Tensor | Batch]:
        """The sequences of the data, int64 (length,), none of them empty; or with images, a Batch.

        Those of a processor's batch are one.
        """
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

    def _item(self, item: Any, where: str) -> Iterator[Tensor | Batch]:
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

    def _columns(self, columns: Mapping[str, Any], where: str) -> Iterator[Tensor | Batch]:
        """Sequences of a row or batch with named columns: ids (and a mask), chats or texts."""
        if "input_ids" in columns and is_featured(columns, self.taken):
            yield from featured_batches(columns, self.taken, where)
            return
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
                images = columns.get("images") if len(documents) == 1 else None
                yield from self._chat(document, where, images)
            else:
                raise CalibrationError(
                    f"{where} has {', '.join(map(repr, columns))}, and no input_ids, no text and "
                    "no messages among them: rename the column"
                )

    def _chat(self, messages: Any, where: str, images: Any = None) -> Iterator[Tensor | Batch]:
        if has_media(messages):
            self.full |= self.texts == self.settings.samples
            if not self.full:
                self.texts += 1
                yield chat_batch(messages, images, self._known_processor(), self.taken, where)
            return
        yield from self._text(render_chat(list(messages), where, self._known_tokenizer()))

    def _text(self, text: str) -> Iterator[Tensor]:
        """A text's first tokens; nothing for an empty text, such as WikiText's empty rows."""
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

    def _known_processor(self) -> ProcessorMixin:
        if self.processor is None:
            raise CalibrationError("data hold images, and there is no processor: pass one")
        return self.processor()


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
    """Sequences of token ids, int64 (length,), on the CPU."""
    for row in _rows(values, where):
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise CalibrationError(f"{where} holds {row.dtype}, which are no token ids: {_FORMS}")
        yield row.to("cpu", torch.int64)


def _visible(values: Any, mask: Any, where: str) -> Iterator[Tensor]:
    """Sequences of token ids without those that the mask hides. mask: 0 or 1 per id, or None."""
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
    """Non-empty rows (length,) of an array with one or two dimensions, or of nested lists."""
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
