"""Calibration rows with images, video or sound: chats through a processor, and ready batches."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, ProcessorMixin

from ..errors import CalibrationError, first_line
from .text import Row, TextSource
from .tokens import Batch

MEDIA = ("image", "video", "audio")  # types of parts of a message beside text
_PLACES = ("path", "url", "image", "video", "audio")  # keys of a part that may name a file
_TABLES = (".json", ".jsonl")
_NO_FEATURES = ("input_ids", "attention_mask", "labels", "inputs_embeds")
_FEATURES = ("pixel_", "image", "video", "audio", "input_features")  # beginnings of their names
_PLACEHOLDERS = ("image_token_id", "image_token_index")  # of a config


@dataclass(frozen=True)
class Taken:
    """What a model's forward takes beside token ids.

    Attributes:
        model: the name of its class.
        names: of its arguments.
        placeholder: the token that stands for a piece of an image; None where the config has none.
    """

    model: str
    names: frozenset[str]
    placeholder: int | None

    @classmethod
    def of(cls, model: nn.Module, config: PretrainedConfig) -> Taken:
        """What a model takes, and the model in it without a head, which gets its other arguments.

        Args:
            model: on any device.
            config: of it.
        """
        inner = getattr(model, "base_model", model)
        forwards = (type(model).forward, type(inner).forward)
        names = {name for forward in forwards for name in inspect.signature(forward).parameters}
        tokens = (getattr(config, name, None) for name in _PLACEHOLDERS)
        placeholder = next((token for token in tokens if isinstance(token, int)), None)
        return cls(type(model).__name__, frozenset(names), placeholder)


def has_media(messages: Any) -> bool:
    """Whether a part of a chat's messages is an image, video or sound."""
    return any(part.get("type") in MEDIA for part in _parts(messages))


def _parts(messages: Any) -> Iterator[Mapping[str, Any]]:
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            yield from (part for part in content if isinstance(part, Mapping))


def chat_batch(
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any] | None,
    processor: ProcessorMixin,
    taken: Taken,
    where: str,
) -> Batch:
    """What a processor makes of a chat, as the input of one forward.

    Args:
        messages: role and content of each, the content text or a list of parts.
        images: those that parts without a source stand for, in their order; or None.
        processor: of the model.
        taken: what the model takes.
        where: the place in the data, for messages.

    Raises:
        CalibrationError: if an image cannot be read, or the processor cannot take the chat.
    """
    waiting = iter(() if images is None else images)

    def complete(part: Mapping[str, Any]) -> dict[str, Any]:
        whole = {key: value for key, value in part.items() if value is not None}
        if whole.get("type") == "image" and not any(key in whole for key in (*_PLACES, "base64")):
            try:
                whole["image"] = next(waiting)
            except StopIteration:
                raise CalibrationError(
                    f"{where} has an image without a source: give its 'path', 'url' or 'image', "
                    "or the row's 'images'"
                ) from None
        return whole

    conversation = [
        {**message, "content": [complete(part) for part in message["content"]]}
        if isinstance(message.get("content"), list | tuple)
        else dict(message)
        for message in messages
    ]
    if next(waiting, None) is not None:
        raise CalibrationError(f"{where} has more images than its messages have parts for them")
    try:
        columns: Any = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except Exception as error:  # of Jinja, Pillow, the hub's client or the processor
        raise CalibrationError(
            f"{where}: {type(processor).__name__} cannot process it "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not is_featured(columns, taken):
        raise CalibrationError(
            f"{where}: {type(processor).__name__} makes no features of its images: give the "
            "model's own processor as tokenizer"
        )
    (batch,) = featured_batches(columns, taken, where)
    return batch


def is_featured(columns: Mapping[str, Any], taken: Taken) -> bool:
    """Whether the columns of a batch with `input_ids` hold features of images or sound."""
    return any(
        name not in _NO_FEATURES
        and (name in taken.names or name.startswith(_FEATURES))
        and _is_float(value)
        for name, value in columns.items()
    )


def _is_float(value: Any) -> bool:
    """Whether a value is an array of floats with two dimensions or more, or a list of such."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() > 1
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f" and value.ndim > 1
    depth = 0
    while isinstance(value, list | tuple) and len(value):
        value, depth = value[0], depth + 1
    return (isinstance(value, float) and depth > 1) or (depth > 0 and _is_float(value))


def featured_batches(columns: Mapping[str, Any], taken: Taken, where: str) -> list[Batch]:
    """What a processor made, as inputs of single forwards without padding.

    Args:
        columns: `input_ids` (rows, length), features, and perhaps an `attention_mask`.
        taken: what the model takes.
        where: the place in the data, for messages.

    Returns:
        One batch; or one of each row where the mask hides tokens of several.

    Raises:
        CalibrationError: for what the model does not take, and for rows that cannot be told apart.
    """
    tensors = {name: _tensor(value, f"{where}: {name}") for name, value in columns.items()}
    arrays = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    ids = arrays.get("input_ids")
    if ids is None or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise CalibrationError(
            f"{where}: input_ids beside features of images are integers (rows, length), as a "
            "processor makes them with return_tensors='pt'"
        )
    ids, mask = ids.long(), arrays.get("attention_mask")
    features = {name: value for name, value in arrays.items() if name not in _NO_FEATURES}
    unknown = [name for name in features if name not in taken.names]
    foreign = [name for name in unknown if features[name].shape != ids.shape]
    if foreign:
        raise CalibrationError(f"{where} has {', '.join(foreign)}, which {taken.model} cannot take")
    features = {name: value for name, value in features.items() if name in taken.names}
    if mask is None:
        return [Batch(ids, features, where)]
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise CalibrationError(f"{where}: its attention_mask is 0 or 1 for each of the input_ids")
    if not bool((mask == 0).any()):
        return [Batch(ids, features | {"attention_mask": mask}, where)]
    batch = Batch(ids, features | {"attention_mask": mask}, where)
    return [_without_padding(row) for row in ([batch] if len(ids) == 1 else _rows(batch, taken))]


def _tensor(value: Any, where: str) -> Tensor | None:
    """A column as a tensor on the CPU, floats in float32; None for what holds no numbers."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        if len({tensor.shape for tensor in value}) > 1:
            raise CalibrationError(f"{where} holds tensors of several shapes: give one tensor")
        value = torch.stack(list(value))
    elif isinstance(value, np.ndarray | list | tuple):
        try:
            value = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            return None
    if not isinstance(value, Tensor):
        return None
    tensor: Tensor = value.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _without_padding(row: Batch) -> Batch:
    """A batch of one row without the tokens that its mask hides."""
    shape, seen = row.tokens.shape, row.features["attention_mask"][0].bool()
    if not bool(seen.any()):
        raise CalibrationError(f"{row.where}: the attention_mask hides a whole sequence")
    features = {
        name: tensor[:, seen] if tensor.shape == shape else tensor
        for name, tensor in row.features.items()
    }
    return Batch(row.tokens[:, seen], features, row.where)


def _rows(batch: Batch, taken: Taken) -> Iterator[Batch]:
    """The rows of a batch, each with its features.

    It is known which they are where every row has one image: as many images as rows, and a
    placeholder in each.
    """
    rows, grids = len(batch.tokens), batch.features.get("image_grid_thw")
    patches = None if grids is None else grids.prod(dim=-1)
    marked = torch.isin(batch.tokens, -1 if taken.placeholder is None else taken.placeholder)

    def divided(tensor: Tensor) -> Sequence[Tensor] | None:
        if len(tensor) == rows:
            return tuple(tensor.split(1))
        if patches is not None and len(tensor) == int(patches.sum()):
            return tuple(tensor.split(patches.tolist()))
        return None

    parts = {name: divided(tensor) for name, tensor in batch.features.items()}
    if not bool(marked.any(dim=1).all()) or any(
        part is None or len(part) != rows for part in parts.values()
    ):
        raise CalibrationError(
            f"{batch.where}: which images are of which of its {rows} rows cannot be told, and its "
            "attention_mask hides tokens: give one row a batch"
        )
    for row in range(rows):
        features = {name: part[row] for name, part in parts.items() if part is not None}
        yield Batch(batch.tokens[row : row + 1], features, f"{batch.where}, row {row}")


def chats_with_media(source: TextSource) -> list[Row] | None:
    """The rows of a local `.json` or `.jsonl` file if a chat in it has images, video or sound.

    Paths in it are taken from the file's folder. None for any other source; whether it can be read
    as text is left to `load_texts`.
    """
    path = Path(source.name).expanduser()
    if source.split is not None or path.suffix.lower() not in _TABLES or not path.is_file():
        return None
    column = source.text_column or "messages"
    try:
        text = path.read_text("utf-8")
        if not any(f'"{kind}"' in text for kind in MEDIA):
            return None
        whole = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
        lines = (line for line in text.splitlines() if line.strip())
        rows = json.loads(text) if whole else [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    if not all(isinstance(row, dict) for row in rows):
        return None
    if not any(has_media(row.get(column)) for row in rows):
        return None
    return [_beside(row, path.parent) for row in rows]


def _beside(value: Any, folder: Path, key: str = "") -> Any:
    """A row with paths of files from a folder."""
    if isinstance(value, dict):
        return {name: _beside(member, folder, name) for name, member in value.items()}
    if isinstance(value, list):
        return [_beside(member, folder, key) for member in value]
    if isinstance(value, str) and key in (*_PLACES, "images") and len(value) < 4096:
        path = folder / value
        return str(path) if "://" not in value and path.is_file() else value
    return value


ProcessorOf = Callable[[], ProcessorMixin]
"""Gives a model's processor where it is first needed; raises CalibrationError if it has none."""
