"""Everything that `smoothq eval` measures of a model, and how it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.positions import within_positions
from ..data.text import TextSource, evaluation_tokens
from ..data.tokenizer import check_tokens
from ..errors import CalibrationError
from ..report.table import markdown
from .divergence import (
    Agreement,
    agreement,
    check_vocabularies,
    logits_count,
    prefill_and_decode,
)
from .perplexity import Perplexity, perplexity, windows_of
from .tasks import TaskResults, run_tasks

OnWindow = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TextResult:
    """A model on one text. against: the reference's perplexity there, and how far they agree."""

    text: str
    own: Perplexity
    reference: Perplexity | None = None
    against: Agreement | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity over the reference's."""
        return None if self.reference is None else self.own.perplexity / self.reference.perplexity


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model. decoded: its decoding set against its own prefill."""

    model: str
    reference: str | None
    texts: tuple[TextResult, ...]
    decoded: Agreement | None
    tasks: TaskResults | None

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "model": self.model,
            "against": self.reference,
            "texts": [
                {
                    "text": each.text,
                    **asdict(each.own),
                    **(
                        {}
                        if each.reference is None or each.against is None
                        else {
                            "reference_perplexity": each.reference.perplexity,
                            "perplexity_ratio": each.ratio,
                            "divergence": each.against.divergence,
                            "top1": each.against.top1,
                        }
                    ),
                }
                for each in self.texts
            ],
            "decode": None if self.decoded is None else asdict(self.decoded),
            "tasks": None if self.tasks is None else [asdict(value) for value in self.tasks.values],
        }

    def rows(self) -> list[tuple[str, str]]:
        """The table: label and value."""
        rows = []
        for each in self.texts:
            own = each.own
            rows += [
                ("text", f"{each.text}, {own.windows} windows of {own.sequence_length} tokens"),
                ("perplexity", f"{own.perplexity:.4f}"),
            ]
            if each.reference is not None and each.against is not None:
                theirs = f"{each.reference.perplexity:.4f}"
                rows += [
                    (f"perplexity of {self.reference}", f"{theirs}, ratio {each.ratio:.4f}"),
                    ("KL to it, nats a token", f"{each.against.divergence:.5f}"),
                    ("same next token", f"{each.against.top1:.2%}"),
                ]
        if self.decoded is not None:
            tokens = self.decoded.tokens
            rows += [
                (f"KL of {tokens} tokens decoded, to prefill", f"{self.decoded.divergence:.2g}"),
                ("same next token, decoded and prefilled", f"{self.decoded.top1:.2%}"),
            ]
        for value in () if self.tasks is None else self.tasks.values:
            error = "" if value.stderr is None else f" ± {value.stderr:.4f}"
            kind = "" if value.filter == "none" else f" ({value.filter})"
            rows.append((f"{value.task}: {value.metric}{kind}", f"{value.value:.4f}{error}"))
        return rows

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown(("", self.model), self.rows())


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[TextSource] = (),
    *,
    name: str = "model",
    reference: PreTrainedModel | None = None,
    reference_name: str | None = None,
    reference_tokenizer: PreTrainedTokenizerBase | None = None,
    windows: int | None = None,
    sequence_length: int = 2048,
    batch_size: int = 1,
    decode_tokens: int = 0,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    on_window: OnWindow | None = None,
) -> Evaluation:
    """Measure a model: perplexity on texts, agreement with another, with itself, and tasks.

    reference: a model of the same vocabulary, mostly the float one; `agreement` takes the same
    windows as the perplexity, of no more tokens than either model has positions.
    reference_tokenizer: what the reference reads text with, to see that ids mean the same to it.
    decode_tokens: so many tokens of the first text are decoded one by one and compared with their
    prefill. tasks, include_path, limit, num_fewshot: as for
    `run_tasks`. Raises CalibrationError for what cannot be measured, CheckpointError for a
    tokenizer whose tokens the model does not have.
    """
    if (reference is not None or decode_tokens) and not texts:
        raise CalibrationError("agreement needs a text to be measured on: give one")
    read = [(source, evaluation_tokens(tokenizer, source)) for source in texts]
    models = [model] if reference is None else [model, reference]
    if reference is not None:
        named = reference_name or "the reference"
        check_vocabularies({named: logits_count(reference), name: logits_count(model)})
        if reference_tokenizer is not None:
            _check_meaning(tokenizer, reference_tokenizer, [tokens for _, tokens in read], named)
    for each in models if texts else ():
        sequence_length = within_positions(each, sequence_length, "windows")
        decode_tokens = within_positions(each, decode_tokens, "tokens to decode")
    results, decoded = [], None
    for source, tokens in read:
        embedding: Any = model.get_input_embeddings()
        check_tokens(tokens, embedding.weight.shape[0], name)
        own = perplexity(model, tokens, sequence_length, windows, batch_size, on_window)
        theirs = against = None
        if reference is not None:
            theirs = perplexity(reference, tokens, sequence_length, windows, batch_size, on_window)
            against = agreement(model, reference, windows_of(tokens, sequence_length, windows))
        results.append(TextResult(source.name, own, theirs, against))
        if decode_tokens and decoded is None:
            decoded = prefill_and_decode(model, torch.LongTensor(tokens[:, :decode_tokens]))
    done = None
    if tasks:
        done = run_tasks(
            *(model, tokenizer, tasks, include_path),
            limit=limit,
            batch_size=batch_size,
            num_fewshot=num_fewshot,
        )
    return Evaluation(name, reference_name, tuple(results), decoded, done)


def _check_meaning(
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    texts: Sequence[Tensor],
    reference: str,
) -> None:
    """Raise CalibrationError where an id in the texts is another token to the reference."""
    used = torch.cat([tokens.flatten() for tokens in texts]).unique().tolist()
    pairs = zip(ours.convert_ids_to_tokens(used), theirs.convert_ids_to_tokens(used), strict=True)
    for number, (own, other) in zip(used, pairs, strict=True):
        if own != other:
            raise CalibrationError(
                f"token {number} is {own!r}, and {other!r} to {reference}: predictions are "
                "compared between models of one vocabulary"
            )
