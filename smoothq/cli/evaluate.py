"""The commands that run a model: eval, compare and generate."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from ..errors import needs_package
from ..report.table import columns, pairs
from .common import (
    Device,
    Json,
    Memory,
    Model,
    RunDtype,
    TrustRemoteCode,
    silence_transformers,
)
from .terminal import out, perplexity_so_far, progress


def evaluate(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to evaluate on, as for --calibration; repeatable. wikitext2."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Model to compare with, mostly the float one.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, or .yaml task files: a,b,c.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of more task files for lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a task's prompt.")] = None,
    decode_tokens: Annotated[
        int, typer.Option(help="Decode so many tokens one by one, and compare with prefill.")
    ] = 0,
    windows: Annotated[int | None, typer.Option(help="At most this many windows.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests of a task, a forward.")] = 1,
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of its text.")] = None,
    dtype: RunDtype = "auto",
    device: Device = "auto",
    memory: Memory = "fast",
    trust_remote_code: TrustRemoteCode = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL, float or quantized: perplexity, agreement with another model, lm-eval's tasks.

    Example: smoothq eval OUT --text builtin --windows 4 --sequence-length 512 --against MODEL
    """
    from ..data.text import TextSource
    from ..evaluation.evaluate import evaluate as measure
    from ..evaluation.load import check_stored_vocabularies, load_model

    silence_transformers()
    if against is not None:
        check_stored_vocabularies(against, model, trust_remote_code=trust_remote_code)
    named = [] if tasks is None else tasks.split(",")
    if named:
        needs_package("lm_eval", "eval")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    texts = text or ([] if named else ["wikitext2"])
    how = (dtype, device, memory, trust_remote_code)
    loaded, tokenizer = load_model(model, *how)
    reference, its_tokenizer = (None, None) if against is None else load_model(against, *how)
    with progress() as update:
        evaluation = measure(
            loaded,
            tokenizer,
            [TextSource(source, split, text_column) for source in texts],
            name=model,
            reference=reference,
            reference_name=against,
            reference_tokenizer=its_tokenizer,
            windows=windows,
            sequence_length=sequence_length,
            batch_size=batch_size,
            decode_tokens=decode_tokens,
            tasks=named,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            on_window=perplexity_so_far(update),
        )
    if as_json:
        print(json.dumps(evaluation.as_dict()))
    elif as_markdown:
        print(evaluation.markdown())
    else:
        out.print(pairs(model, evaluation.rows()))


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Directories or hub ids, float or quantized.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Model whose predictions are the reference of KL.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("-o", "--plot", help="Draw size against loss as a PNG file.")
    ] = None,
    text: Annotated[str, typer.Option(help="Text to evaluate on, as for --calibration.")] = (
        "wikitext2"
    ),
    windows: Annotated[int, typer.Option(help="At most this many windows.", min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 1024,
    dtype: RunDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Set models side by side: size, bits, loss, speed, memory, and the differences of recipes.

    Example: smoothq compare MODEL OUT --against MODEL --text builtin -o sizes.png
    """
    from ..data.text import TextSource
    from ..evaluation import compare as side_by_side

    silence_transformers()
    if plot is not None:
        needs_package("matplotlib", "plots")
    with progress() as update:
        measurements = side_by_side.compare(
            models,
            TextSource(text),
            against=against,
            windows=windows,
            sequence_length=sequence_length,
            dtype=dtype,
            device=device,
            on_window=perplexity_so_far(update),
            trust_remote_code=trust_remote_code,
        )
    if plot is not None:
        side_by_side.plot(measurements, plot)
    if as_json:
        print(json.dumps([measurement.as_dict() for measurement in measurements]))
        return
    if as_markdown:
        print(side_by_side.markdown(measurements))
        return
    measured = measurements[0].evaluation.texts[0].perplexity
    sizes = f"{measured.windows} windows of {measured.sequence_length} tokens"
    title = f"{sizes} of {text}; tokens a second, batch 1"
    out.print(columns(title, side_by_side.HEADER, side_by_side.rows(measurements)), soft_wrap=False)
    differing = [(name, *values) for name, values in side_by_side.differences(measurements).items()]
    if differing:
        header = ("recipe", *models)
        out.print(columns("What the recipes differ in", header, differing), soft_wrap=False)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template, if it has one.")
    ] = True,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    dtype: RunDtype = "auto",
    device: Device = "auto",
    memory: Memory = "fast",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Stream MODEL's continuation of PROMPT.

    Example: smoothq generate OUT "The capital of France is" --no-chat
    """
    from ..evaluation.generate import stream_text
    from ..evaluation.load import load_model

    silence_transformers()
    loaded, tokenizer = load_model(model, dtype, device, memory, trust_remote_code)
    stream_text(loaded, tokenizer, prompt, model, max_new_tokens, chat=chat, sample=sample)
