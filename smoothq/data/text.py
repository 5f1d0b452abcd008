"""Reads texts and data sets, and tokenises them for calibration and for evaluation.

A `TextSource` names where text comes from: a data set of the Hugging Face hub, a local file, or
`builtin`, the Python language reference that every Python installation carries. `load_texts` reads
its documents, `calibration_tokens` cuts random windows out of them and `evaluation_tokens` makes
the one long sequence that perplexity is measured on.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import CalibrationError
from .tokenizer import in_one_line

log = logging.getLogger("smoothq")

Purpose = Literal["calibration", "evaluation"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        name: `wikitext2`, `c4`, `ptb`, `builtin`, a local file, or the id of a data set on the hub.
        split: of the data set, instead of the default for the purpose; may be a slice such as
            `train[:1000]`, except for `c4`.
        text_column: the column of texts, or of chats as lists of role and content.
    """

    name: str = "wikitext2"
    split: str | None = None
    text_column: str | None = None


@dataclass(frozen=True)
class _HubDataset:
    """Arguments of `datasets.load_dataset` for a data set, and its split for each purpose."""

    path: str
    calibration: str = "train"
    evaluation: str = "test"
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None


_NAMED = {
    "wikitext2": _HubDataset("Salesforce/wikitext", config="wikitext-2-raw-v1"),
    "c4": _HubDataset("allenai/c4", config="en", evaluation="validation"),
    # The main branch is a loading script, which `datasets` refuses; the hub's Parquet copy is data.
    "ptb": _HubDataset(
        "ptb-text-only/ptb_text_only", data_dir="penn_treebank", revision="refs/convert/parquet"
    ),
}
# Rows of these sources are lines or sections of one running text, not separate documents.
_RUNNING_TEXT = ("wikitext2", "ptb", "builtin")
_TABLE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FILE_SUFFIXES = (*_TABLE_BUILDERS, ".txt", ".raw", ".tokens", ".text", ".md", ".rst")
TEXT_COLUMNS = ("text", "sentence", "content")
# GPTQ's C4 perplexity takes the first 1100 validation documents (datautils.py).
_C4_EVALUATION_DOCUMENTS = 1100
# Read more documents than the windows need, so that the seed chooses among them.
_STREAM_MARGIN = 4
_WITHOUT_NETWORK = "a local text file or 'builtin' needs no network"


def load_texts(
    source: TextSource, purpose: Purpose, tokenizer: PreTrainedTokenizerBase
) -> list[str] | Iterator[str]:
    """Read a source's documents, in their order.

    A text file is one document, exactly as it stands. The rows of `.json`, `.jsonl` and `.parquet`
    files and of data sets are one document each: `messages` are rendered by the tokenizer's chat
    template, other rows give their text column (`text`, `sentence`, `content` or the only column
    of strings). `builtin` gives the topics of the Python language reference sorted by name, every
    fourth one for evaluation and the rest for calibration.

    Args:
        source: of the texts.
        purpose: selects the split where the source names none.
        tokenizer: whose chat template renders `messages`.

    Returns:
        A list for text files, `builtin`, `wikitext2` and `ptb`; otherwise an iterator that reads
        lazily and may raise as well.

    Raises:
        CalibrationError: if the source cannot be found, reached or read, or has no text.
    """
    if source.name == "builtin":
        _refuse_selection(source)
        return _builtin_topics(purpose)
    if source.name in _NAMED:
        texts = _hub_texts(source, _NAMED[source.name], purpose, tokenizer)
        if source.name != "c4":
            return list(texts)
        return islice(texts, _C4_EVALUATION_DOCUMENTS) if purpose == "evaluation" else texts
    path = Path(source.name).expanduser()
    if path.is_file():
        if path.suffix.lower() in _TABLE_BUILDERS:
            return _table_texts(source, path, tokenizer)
        _refuse_selection(source)
        return [_read_text(path)]
    if not path.is_dir() and _looks_like_path(source.name):
        raise CalibrationError(
            f"no file {source.name!r}: give an existing text, .jsonl, .json or .parquet file, "
            "a data set id, or 'builtin'"
        )
    return _hub_texts(source, _HubDataset(source.name), purpose, tokenizer)


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    samples: int,
    sequence_length: int,
    seed: int,
) -> torch.LongTensor:
    """Draw random windows that do not overlap from a source's tokens.

    Documents of `wikitext2`, `ptb` and `builtin` are joined with blank lines and tokenised as one
    text, as a text file is; other documents are tokenised one by one and concatenated, until there
    are `_STREAM_MARGIN` times as many tokens as the windows need. Special tokens appear only where
    `tokenizer(text)` puts them at the very beginning. The windows are drawn without repetition from
    the grid of whole windows, with a generator that only `seed` determines.

    Args:
        tokenizer: of the model.
        source: of the texts.
        samples: number of windows.
        sequence_length: tokens of a window.
        seed: of the draw.

    Returns:
        int64 (samples, sequence_length) on the CPU; fewer rows, with a warning, if the text holds
        fewer whole windows.

    Raises:
        CalibrationError: for numbers below 1, no text, or less text than one window.
    """
    if samples < 1 or sequence_length < 1:
        raise CalibrationError(
            f"cannot calibrate on {samples} samples of {sequence_length} tokens: "
            "both must be at least 1"
        )
    documents: Iterable[str] = load_texts(source, "calibration", tokenizer)
    if source.name in _RUNNING_TEXT:
        documents = ["\n\n".join(documents)]
    tokens = tokenize(tokenizer, documents, enough=_STREAM_MARGIN * samples * sequence_length)
    if not tokens:
        raise _no_text(source)
    available = len(tokens) // sequence_length
    if available == 0:
        raise CalibrationError(
            f"calibration text {source.name!r} has {len(tokens)} tokens and one sequence needs "
            f"{sequence_length}: use a smaller sequence_length or a longer text"
        )
    if available < samples:
        log.warning(
            "calibration text %r holds %d whole sequences of %d tokens, %d were asked for: "
            "using %d",
            source.name,
            available,
            sequence_length,
            samples,
            available,
        )
    taken = tokens[: available * sequence_length]
    grid = torch.tensor(taken, device="cpu").view(available, sequence_length)
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(available, generator=generator, device="cpu")[:samples]
    return torch.LongTensor(grid[chosen])


def evaluation_tokens(tokenizer: PreTrainedTokenizerBase, source: TextSource) -> torch.LongTensor:
    """Tokenise a source's whole evaluation text at once, as published perplexities do.

    Documents are joined with blank lines; a text file is one document; `c4` is the first 1100
    documents of its validation split joined with spaces, of which published figures use the first
    256 windows of 2048 tokens (GPTQ, arXiv 2210.17323, and its datautils.py).

    Args:
        tokenizer: of the model.
        source: of the text.

    Returns:
        int64 (1, tokens) on the CPU.

    Raises:
        CalibrationError: if the source cannot be read or holds no text.
    """
    separator = " " if source.name == "c4" else "\n\n"
    text = separator.join(load_texts(source, "evaluation", tokenizer))
    tokens = tokenize(tokenizer, [text])
    if not tokens:
        raise _no_text(source)
    return torch.LongTensor(torch.tensor([tokens], device="cpu"))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], enough: int | None = None
) -> list[int]:
    """Tokenise documents one by one and concatenate their tokens.

    Special tokens appear only at the very beginning; empty documents are skipped.

    Args:
        tokenizer: of the model.
        documents: texts.
        enough: number of tokens after which no further document is read; None reads all.

    Returns:
        Token ids, at least `enough` of them where the documents suffice.
    """
    tokens: list[int] = []
    for document in documents:
        if not document:
            continue
        # A chat template writes the beginning-of-sequence token itself: do not add a second one.
        begun = bool(tokens) or (
            bool(tokenizer.bos_token) and document.startswith(str(tokenizer.bos_token))
        )
        with in_one_line(f"{tokenizer.name_or_path}: its tokenizer cannot encode text"):
            encoded = tokenizer(
                document,
                add_special_tokens=not begun,
                return_special_tokens_mask=True,
                verbose=False,  # the text is meant to be longer than the model's window
            )
        added_at_end = takewhile(bool, reversed(encoded["special_tokens_mask"]))
        tokens += encoded["input_ids"][: len(encoded["input_ids"]) - sum(1 for _ in added_at_end)]
        if enough is not None and len(tokens) >= enough:
            break
    return tokens


def _builtin_topics(purpose: Purpose) -> list[str]:
    """Topics of the Python language reference: every fourth for evaluation, else calibration."""
    from pydoc_data.topics import topics

    held_out = purpose == "evaluation"
    return [topics[name] for i, name in enumerate(sorted(topics)) if (i % 4 == 3) == held_out]


def _read_text(path: Path) -> str:
    """The text of a file, decoded from bytes, because text mode would translate line ends."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read {str(path)!r} as UTF-8 text ({error}): "
            "give plain text, .jsonl, .json or .parquet"
        ) from error


def _table_texts(
    source: TextSource, path: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """The documents of a local `.json`, `.jsonl` or `.parquet` file."""
    if path.stat().st_size == 0:
        raise _no_text(source)
    split, builder = source.split or "train", _TABLE_BUILDERS[path.suffix.lower()]
    options = {"data_files": str(path), "split": split, "streaming": _can_stream(split)}
    return _texts(_load_dataset(source, (builder,), options), source, tokenizer)


def _hub_texts(
    source: TextSource, dataset: _HubDataset, purpose: Purpose, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """The documents of a data set on the hub, or of a data set in a local folder."""
    split = source.split or getattr(dataset, purpose)
    # C4 has 300 GB; of other data sets than `_NAMED`, calibration needs only the beginning.
    streaming = source.name == "c4" or (
        source.name not in _NAMED and purpose == "calibration" and _can_stream(split)
    )
    options: dict[str, Any] = {"data_dir": dataset.data_dir, "revision": dataset.revision}
    options |= {"split": split, "streaming": streaming}
    rows = _load_dataset(source, (dataset.path, dataset.config), options)
    return _texts(rows, source, tokenizer)


def _load_dataset(
    source: TextSource, what: tuple[str | None, ...], options: dict[str, Any]
) -> Iterable[Row]:
    """What `datasets.load_dataset` returns; CalibrationError where it cannot read the source."""
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(*what, **options)
    except Exception as error:  # pyarrow, pandas, the hub's client and datasets share no base
        raise _unreadable(source, error) from error
    return rows


def _texts(
    rows: Iterable[Row], source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """One document per row; empty strings stay, because they become blank lines when joined."""
    column = None
    for index, row in enumerate(_rows(rows, source)):
        if column is None:
            column = _text_column(row, source)
        value = row[column]
        if isinstance(value, list):
            yield render_chat(value, f"row {index} of {source.name!r}", tokenizer)
        elif isinstance(value, str):
            yield value
        elif value is not None:
            raise CalibrationError(
                f"row {index} of {source.name!r} has {type(value).__name__} in column {column!r}: "
                "name a column of strings or chats as text_column"
            )


def _rows(rows: Iterable[Row], source: TextSource) -> Iterator[Row]:
    """The rows unchanged; errors raised while streaming become CalibrationErrors."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # streaming downloads and parses here, without a common base
            raise _unreadable(source, error) from error
        yield row


def _text_column(row: Row, source: TextSource) -> str:
    """The column to read, decided on the first row."""
    if source.text_column is not None:
        if source.text_column in row:
            return source.text_column
    elif isinstance(row.get("messages"), list):
        return "messages"
    else:
        strings = [name for name, value in row.items() if isinstance(value, str)]
        for name in TEXT_COLUMNS:
            if name in row:
                return name
        if len(strings) == 1:
            return strings[0]
    wanted = "text" if source.text_column is None else repr(source.text_column)
    raise CalibrationError(
        f"no {wanted} column in {source.name!r}, which has {', '.join(row)}: "
        "name one of them as text_column"
    )


def render_chat(
    messages: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Render a chat with the tokenizer's chat template.

    Args:
        messages: role and content of each message.
        where: position in the data, for messages of errors.
        tokenizer: with a chat template.

    Raises:
        CalibrationError: if the template cannot render the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template may raise anything that Jinja can
        raise CalibrationError(
            f"the tokenizer's chat template cannot render {where} "
            f"({_reason(error)}): use a chat model's tokenizer or name another text_column"
        ) from error


def _can_stream(split: str) -> bool:
    """Whether `datasets` can stream a split: not a slice such as `train[:100]`."""
    return "[" not in split


def _looks_like_path(name: str) -> bool:
    """Whether the name of a missing file looks like a path and not like `[owner/]name`."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or Path(name).suffix.lower() in _FILE_SUFFIXES
    )


def _refuse_selection(source: TextSource) -> None:
    """Refuse a split or text column for plain text, which has neither."""
    for field in ("split", "text_column"):
        if getattr(source, field) is not None:
            raise CalibrationError(
                f"{source.name!r} is plain text and has no {field}: leave {field} out"
            )


def _no_text(source: TextSource) -> CalibrationError:
    return CalibrationError(f"{source.name!r} holds no text: choose another source or split")


def _unreadable(source: TextSource, error: Exception) -> CalibrationError:
    """The CalibrationError for an exception raised while reading a file or the hub."""
    if Path(source.name).expanduser().exists() and source.name not in _NAMED:
        return CalibrationError(
            f"cannot read {source.name!r} ({_reason(error)}): check the file's format and the split"
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return CalibrationError(
            f"the Hugging Face hub cannot be reached for data set {source.name!r} "
            f"({_reason(error)}): {_WITHOUT_NETWORK}"
        )
    return CalibrationError(
        f"cannot load data set {source.name!r} ({_reason(error)}): check its name and split; "
        f"{_WITHOUT_NETWORK}"
    )


def _reason(error: Exception) -> str:
    """An error's type and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
