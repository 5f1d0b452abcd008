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
from ..checkpoint.hub_files import resolve_directory
from ..checkpoint.model_config import read_config
from ..checkpoint.weight_files import tensor_files
from ..data.text import TextSource
from ..errors import CalibrationError
from ..plan.plan import Bits, Plan
from ..report.table import markdown as markdown_table
from ..runtime.offload import running_device
from .evaluate import Evaluation, OnWindow, evaluate
from .load import check_stored_vocabularies, load_model

log = logging.getLogger("smoothq")

PROMPT, DECODED = 512, 16  # tokens of the timed prompt, and tokens decoded after it
REPETITIONS = 3  # timed prompts, and decodings, of which the median is taken
HEADER = ("model", "MB", "held", "bits", "inputs", "perplexity", "KL", "prefill", "decode")


@dataclass(frozen=True)
class ModelMeasurement:
    """Size, speed and loss of one model.

    Attributes:
        name: directory or hub id.
        recipe: its fields as `section.field`; empty for a float model.
        bits: average bits of weights and inputs; None for a float model.
        stored: bytes of the files that hold its tensors.
        loaded: bytes of all its tensors in memory, see `loaded_bytes`.
        prefill: tokens a second of a prompt of 512 tokens, batch 1.
        decode: tokens a second, decoded one by one after that prompt, batch 1.
        evaluation: perplexity, and agreement with the reference.
    """

    name: str
    recipe: dict[str, Any]
    bits: Bits | None
    stored: int
    loaded: int
    prefill: float
    decode: float
    evaluation: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data, for `smoothq compare --json`."""
        return {
            "recipe": self.recipe or None,
            "bits": None if self.bits is None else vars(self.bits),
            "stored_bytes": self.stored,
            "held_bytes": self.loaded,
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
    device: str = "auto",
    on_window: OnWindow | None = None,
    trust_remote_code: bool = False,
) -> list[ModelMeasurement]:
    """Measure models one after the other, on the same text and against the same reference.

    Args:
        models: directories or hub ids, float or quantized.
        text: where perplexity is measured.
        against: directory or hub id of the reference that KL divergence is measured from.
        windows: at most so many windows of the text; None for all.
        sequence_length: tokens a window; fewer where a model has fewer positions.
        dtype: of all that is not quantized, as for `load_model`.
        device: where the models run, such as `cpu` or `cuda`; `auto` is a GPU where there is one.
        on_window: called after each window, as for `perplexity`.
        trust_remote_code: whether to run code beside the models.

    Raises:
        SmoothqError: a model cannot be loaded.
        CalibrationError: a name is given twice, or a model has another vocabulary than the
            reference.
    """
    if len(set(models)) < len(models):
        raise CalibrationError("a model is named twice: give each once")
    if against is not None:
        check_stored_vocabularies(against, *models, trust_remote_code=trust_remote_code)
    # The same windows for all of them, else their perplexities would not compare.
    configs = [read_config(n, trust_remote_code) for n in filter(None, (against, *models))]
    named = map(named_positions, configs)
    positions = min((number for number in named if number is not None), default=sequence_length)
    if positions < sequence_length:
        log.warning("windows are shortened to %d tokens: a model has no more", positions)
        sequence_length = positions
    reference, its_tokenizer = (
        (None, None)
        if against is None
        else load_model(against, dtype, device, trust_remote_code=trust_remote_code)
    )
    measurements = []
    for name in models:
        model, tokenizer = load_model(name, dtype, device, trust_remote_code=trust_remote_code)
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
        measurements.append(
            ModelMeasurement(
                name=name,
                recipe={} if plan is None else _flat(plan.recipe.model_dump(mode="json")),
                bits=None if plan is None else plan.bits,
                stored=sum(path.stat().st_size for path in files),
                loaded=loaded_bytes(model),
                prefill=prefill,
                decode=decode,
                evaluation=evaluation,
            )
        )
        del model
    return measurements


def differences(measurements: Sequence[ModelMeasurement]) -> dict[str, list[str]]:
    """Recipe fields in which quantized models differ, with the values in the models' order.

    The value is "" for a float model, and where a recipe lacks the field.
    """
    quantized = [measurement.recipe for measurement in measurements if measurement.recipe]
    fields = dict.fromkeys(field for recipe in quantized for field in recipe)
    return {
        field: [
            str(measurement.recipe.get(field, "")) if measurement.recipe else ""
            for measurement in measurements
        ]
        for field in fields
        if len({str(recipe.get(field)) for recipe in quantized}) > 1
    }


def loaded_bytes(model: PreTrainedModel) -> int:
    """Bytes of all tensors of a model in memory, those at the same address counted once.

    Counted are parameters, buffers, and tensors that modules keep as plain attributes, such as
    weights unpacked for a faster kernel.
    """
    bytes_at: dict[int, int] = {}
    for module in model.modules():
        registered = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        attributes = (value for value in vars(module).values() if isinstance(value, Tensor))
        for tensor in (*registered, *attributes):
            bytes_at[tensor.data_ptr()] = tensor.nbytes
    return sum(bytes_at.values())


@torch.no_grad()
def _speed(model: PreTrainedModel) -> tuple[float, float]:
    """Median tokens a second, of a prompt and of decoding after it; batch 1, random tokens."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    limit = positions_of(model)
    decoded = DECODED if limit is None else min(DECODED, limit // 2)
    length = PROMPT if limit is None else min(PROMPT, limit - decoded)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, length), generator=generator, device="cpu").to(
        running_device(model)
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
    """The output of a forward, and its wall-clock seconds."""
    start = time.perf_counter()
    result = call()
    result.logits[0, 0, 0].item()  # waits for the device
    return result, time.perf_counter() - start


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with keys such as `section.field`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def rows(measurements: Sequence[ModelMeasurement]) -> list[tuple[str, ...]]:
    """The cells of the table, a row a model, with the columns of `HEADER`; sizes in MB."""
    lines: list[tuple[str, ...]] = []
    for measurement in measurements:
        result = measurement.evaluation.texts[0]
        lines.append(
            (
                measurement.name,
                f"{measurement.stored / 1e6:.1f}",
                f"{measurement.loaded / 1e6:.1f}",
                "float" if measurement.bits is None else f"{measurement.bits.weight:.2f}",
                "float" if measurement.bits is None else f"{measurement.bits.activation:.2f}",
                f"{result.perplexity.perplexity:.3f}",
                "" if result.against is None else f"{result.against.divergence:.4f}",
                f"{measurement.prefill:.1f}",
                f"{measurement.decode:.1f}",
            )
        )
    return lines


def markdown(measurements: Sequence[ModelMeasurement]) -> str:
    """The table, and the recipe fields in which the models differ, in Markdown."""
    text = markdown_table(HEADER, rows(measurements))
    differing = [(field, *values) for field, values in differences(measurements).items()]
    if not differing:
        return text
    names = ("recipe", *(measurement.name for measurement in measurements))
    return f"{text}\n\n{markdown_table(names, differing)}"


def plot(measurements: Sequence[ModelMeasurement], path: Path) -> None:
    """Draw size against loss as a PNG file: KL to the reference if there is one, or perplexity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    loss = "perplexity"
    for measurement in measurements:
        result, size = measurement.evaluation.texts[0], measurement.stored / 1e6
        value = result.perplexity.perplexity
        if result.against is not None:
            loss, value = "KL to the reference, nats a token", result.against.divergence
        axes.plot(size, value, "o")
        axes.annotate(measurement.name, (size, value), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("MB stored")
    axes.set_ylabel(loss)
    axes.margins(0.2)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
