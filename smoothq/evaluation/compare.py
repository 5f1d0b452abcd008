"""Several models side by side: size, bits, loss, speed, memory, and how their recipes differ."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures.positions import named_positions, positions_of
from ..checkpoint.source import read_config, resolve_directory, tensor_files
from ..data.text import TextSource
from ..errors import CalibrationError
from ..plan.plan import Bits, Plan
from ..report.table import markdown as markdown_table
from .evaluate import Evaluation, OnWindow, evaluate
from .load import check_stored_vocabularies, load_model

log = logging.getLogger("smoothq")

PROMPT, DECODED, REPETITIONS = 512, 16, 3
HEADER = ("model", "MB", "held", "bits", "inputs", "perplexity", "KL", "prefill", "decode")


@dataclass(frozen=True)
class ModelMeasurement:
    """A model, measured. stored: bytes of its tensors' files; held: of its tensors once loaded.

    bits: None for a float model. prefill, decode: tokens a second, batch 1.
    """

    name: str
    recipe: dict[str, Any]
    bits: Bits | None
    stored: int
    held: int
    prefill: float
    decode: float
    evaluation: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "recipe": self.recipe or None,
            "bits": None if self.bits is None else vars(self.bits),
            "stored_bytes": self.stored,
            "held_bytes": self.held,
            "prefill_tokens_per_second": self.prefill,
            "decode_tokens_per_second": self.decode,
            **self.evaluation.as_dict(),
        }


def compare(
    models: Sequence[str],
    text: TextSource,
    *,
    against: str | None = None,
    windows: int | None = None,
    sequence_length: int = 2048,
    dtype: str = "auto",
    device: str = "cpu",
    on_window: OnWindow | None = None,
) -> list[ModelMeasurement]:
    """Measure models one after the other, on the same text and against the same reference.

    Raises SmoothqError for a model that cannot be loaded, CalibrationError for a name given twice
    and for a model of another vocabulary than the reference's.
    """
    if len(set(models)) < len(models):
        raise CalibrationError("a model is named twice: give each once")
    if against is not None:
        check_stored_vocabularies(against, *models)
    # The same windows for all of them, else their perplexities would not compare.
    named = [named_positions(read_config(name)) for name in filter(None, (against, *models))]
    positions = min((number for number in named if number is not None), default=sequence_length)
    if positions < sequence_length:
        log.warning("windows are shortened to %d tokens: a model has no more", positions)
        sequence_length = positions
    reference, its_tokenizer = (
        (None, None) if against is None else load_model(against, dtype, device)
    )
    found = []
    for name in models:
        model, tokenizer = load_model(name, dtype, device)
        evaluation = evaluate(
            *(model, tokenizer, [text]),
            name=name,
            reference=reference,
            reference_name=against,
            reference_tokenizer=its_tokenizer,
            windows=windows,
            sequence_length=sequence_length,
            on_window=on_window,
        )
        plan: Plan | None = getattr(getattr(model, "hf_quantizer", None), "plan", None)
        files = set(tensor_files(resolve_directory(name), name).values())
        prefill, decode = _speed(model)
        found.append(
            ModelMeasurement(
                name=name,
                recipe={} if plan is None else _flat(plan.recipe.model_dump(mode="json")),
                bits=None if plan is None else plan.bits,
                stored=sum(path.stat().st_size for path in files),
                held=held_bytes(model),
                prefill=prefill,
                decode=decode,
                evaluation=evaluation,
            )
        )
        del model
    return found


def differences(contenders: Sequence[ModelMeasurement]) -> dict[str, list[str]]:
    """The fields in which the recipes of quantized models differ, with each model's value."""
    quantized = [each.recipe for each in contenders if each.recipe]
    fields = dict.fromkeys(field for recipe in quantized for field in recipe)
    return {
        field: [str(each.recipe.get(field, "")) if each.recipe else "" for each in contenders]
        for field in fields
        if len({str(recipe.get(field)) for recipe in quantized}) > 1
    }


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of all tensors that a model holds, those derived for running it included."""
    held: dict[int, int] = {}
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for tensor in (*own, *(each for each in vars(module).values() if isinstance(each, Tensor))):
            held[tensor.data_ptr()] = tensor.nbytes
    return sum(held.values())


@torch.no_grad()
def _speed(model: PreTrainedModel) -> tuple[float, float]:
    """Tokens a second, medians: a prompt's, and decoded ones' behind it. Batch 1."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    limit = positions_of(model)
    decoded = DECODED if limit is None else min(DECODED, limit // 2)
    length = PROMPT if limit is None else min(PROMPT, limit - decoded)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, length), generator=generator, device="cpu").to(
        model.device
    )
    prefills, steps = [], []
    for turn in range(REPETITIONS + 1):
        output, spent = _timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))
        prefills += [spent] if turn else []  # the first compiles and fills caches
        for step in range(decoded if turn else 1):
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            output, spent = _timed(
                lambda token=token, cache=cache: model(  # type: ignore[misc]
                    input_ids=token, past_key_values=cache, use_cache=True
                )
            )
            steps += [spent] if turn and step else []
    return length / statistics.median(prefills), 1 / statistics.median(steps)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    result.logits[0, 0, 0].item()  # waits for the device
    return result, time.perf_counter() - start


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section.field`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def rows(contenders: Sequence[ModelMeasurement]) -> list[tuple[str, ...]]:
    """The table: MB stored and held, bits, perplexity, KL to the reference, tokens a second."""
    lines: list[tuple[str, ...]] = []
    for each in contenders:
        result = each.evaluation.texts[0]
        lines.append(
            (
                each.name,
                f"{each.stored / 1e6:.1f}",
                f"{each.held / 1e6:.1f}",
                "float" if each.bits is None else f"{each.bits.weight:.2f}",
                "float" if each.bits is None else f"{each.bits.activation:.2f}",
                f"{result.own.perplexity:.3f}",
                "" if result.against is None else f"{result.against.divergence:.4f}",
                f"{each.prefill:.1f}",
                f"{each.decode:.1f}",
            )
        )
    return lines


def markdown(contenders: Sequence[ModelMeasurement]) -> str:
    """The table and the recipes' differences in Markdown."""
    text = markdown_table(HEADER, rows(contenders))
    differing = [(field, *values) for field, values in differences(contenders).items()]
    if not differing:
        return text
    names = ("recipe", *(each.name for each in contenders))
    return f"{text}\n\n{markdown_table(names, differing)}"


def plot(contenders: Sequence[ModelMeasurement], path: Path) -> None:
    """Size against loss: KL to the reference where there is one, else perplexity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    loss = "perplexity"
    for each in contenders:
        result, size = each.evaluation.texts[0], each.stored / 1e6
        value = result.own.perplexity
        if result.against is not None:
            loss, value = "KL to the reference, nats a token", result.against.divergence
        axes.plot(size, value, "o")
        axes.annotate(each.name, (size, value), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("MB stored")
    axes.set_ylabel(loss)
    axes.margins(0.2)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
