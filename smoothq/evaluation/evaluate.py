"""`smoothq eval`: perplexity, agreement with a reference and lm-eval's tasks, in one result."""

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

OnWindow = Callable[[int, int, float], None]  # windows done, windows in all, perplexity so far


@dataclass(frozen=True)
class TextResult:
    """What was measured of a model on one text.

    Attributes:
        text: name of the text's source.
        perplexity: of the model.
        reference: perplexity of the reference model on the same windows, None without one.
        against: agreement with the reference model on these windows, None without one.
    """

    text: str
    perplexity: Perplexity
    reference: Perplexity | None = None
    against: Agreement | None = None

    @property
    def ratio(self) -> float | None:
        """The model's perplexity over the reference's, None without a reference."""
        if self.reference is None:
            return None
        return self.perplexity.perplexity / self.reference.perplexity

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data, on one level."""
        figures = {"text": self.text, **asdict(self.perplexity)}
        if self.reference is not None and self.against is not None:
            figures["reference_perplexity"] = self.reference.perplexity
            figures["perplexity_ratio"] = self.ratio
            figures |= {"divergence": self.against.divergence, "top1": self.against.top1}
        return figures


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        model: its name.
        reference: name of the model that it was compared with, None without one.
        texts: results on each text.
        decoded: agreement of decoding token by token with prefill, None if not measured.
        tasks: results of lm-eval's tasks, None if none was run.
    """

    model: str
    reference: str | None
    texts: tuple[TextResult, ...]
    decoded: Agreement | None
    tasks: TaskResults | None

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data, for `smoothq eval --json`."""
        return {
            "model": self.model,
            "against": self.reference,
            "texts": [result.as_dict() for result in self.texts],
            "decode": None if self.decoded is None else asdict(self.decoded),
            "tasks": None if self.tasks is None else [asdict(value) for value in self.tasks.values],
        }

    def rows(self) -> list[tuple[str, str]]:
        """The rows of the table: (label, value)."""
        rows = []
        for result in self.texts:
            measured = result.perplexity
            windows = f"{measured.windows} windows of {measured.sequence_length} tokens"
            rows += [
                ("text", f"{result.text}, {windows}"),
                ("perplexity", f"{measured.perplexity:.4f}"),
            ]
            if result.reference is not None and result.against is not None:
                reference = f"{result.reference.perplexity:.4f}"
                rows += [
                    (f"perplexity of {self.reference}", f"{reference}, ratio {result.ratio:.4f}"),
                    ("KL to it, nats a token", f"{result.against.divergence:.5f}"),
                    ("same next token", f"{result.against.top1:.2%}"),
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
        """The table in Markdown, headed by the model's name."""
        return markdown(("", self.model), self.rows())


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[TextSource] = (),
    *,
    text: str | Sequence[str] = (),
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
    """Measure a model: perplexity, agreement with a reference, decode against prefill, and tasks.

    Args:
        model: float or quantized, in memory.
        tokenizer: the model's.
        texts: texts that perplexity and agreement are measured on.
        text: the names of further ones: `wikitext2`, a data set, a file, `builtin`.
        name: the model's name in the result and in messages.
        reference: a model of the same vocabulary, usually the float one; its perplexity and the
            agreement are measured on the windows of the model's perplexity.
        reference_name: its name in the result and in messages.
        reference_tokenizer: its tokenizer, to check that token ids mean the same to both models.
        windows: at most so many windows of each text; None for all.
        sequence_length: tokens a window; fewer where a model has fewer positions.
        batch_size: windows, or requests of a task, a forward.
        decode_tokens: so many first tokens of the first text are decoded one by one and compared
            with their prefill; 0 for none.
        tasks: lm-eval's tasks or task files, as for `run_tasks`.
        include_path: directory of more task files, as for `run_tasks`.
        limit: documents of each task, from the start; None for all.
        num_fewshot: examples in a task's prompt, None for the task's default.
        on_window: called after each window, as for `perplexity`.

    Raises:
        CalibrationError: something cannot be measured.
        CheckpointError: the tokenizer has tokens that the model does not have.
    """
    named_texts = [text] if isinstance(text, str) else text
    texts = [*texts, *map(TextSource, named_texts)]
    if (reference is not None or decode_tokens) and not texts:
        raise CalibrationError("agreement needs a text to be measured on: give one")
    read = [(source, evaluation_tokens(tokenizer, source)) for source in texts]
    models = [model] if reference is None else [model, reference]
    if reference is not None:
        named = reference_name or "the reference"
        check_vocabularies({named: logits_count(reference), name: logits_count(model)})
        if reference_tokenizer is not None:
            _check_meaning(tokenizer, reference_tokenizer, [tokens for _, tokens in read], named)
    for measured_model in models if texts else ():
        sequence_length = within_positions(measured_model, sequence_length, "windows")
        decode_tokens = within_positions(measured_model, decode_tokens, "tokens to decode")
    results, decoded = [], None
    for source, tokens in read:
        embedding: Any = model.get_input_embeddings()
        check_tokens(tokens, embedding.weight.shape[0], name)
        model_perplexity = perplexity(
            model, tokens, sequence_length, windows, batch_size, on_window
        )
        reference_perplexity = against = None
        if reference is not None:
            reference_perplexity = perplexity(
                reference, tokens, sequence_length, windows, batch_size, on_window
            )
            against = agreement(model, reference, windows_of(tokens, sequence_length, windows))
        results.append(TextResult(source.name, model_perplexity, reference_perplexity, against))
        if decode_tokens and decoded is None:
            decoded = prefill_and_decode(model, torch.LongTensor(tokens[:, :decode_tokens]))
    task_results = None
    if tasks:
        task_results = run_tasks(
            *(model, tokenizer, tasks, include_path),
            limit=limit,
            batch_size=batch_size,
            num_fewshot=num_fewshot,
        )
    return Evaluation(name, reference_name, tuple(results), decoded, task_results)


def _check_meaning(
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    texts: Sequence[Tensor],
    reference: str,
) -> None:
    """Raise CalibrationError where an id in the texts is another token to the reference."""
    used = torch.cat([tokens.flatten() for tokens in texts]).unique().tolist()
    pairs = zip(ours.convert_ids_to_tokens(used), theirs.convert_ids_to_tokens(used), strict=True)
    for number, (token, reference_token) in zip(used, pairs, strict=True):
        if token != reference_token:
            raise CalibrationError(
                f"token {number} is {token!r}, and {reference_token!r} to {reference}: "
                "predictions are compared between models of one vocabulary"
            )
