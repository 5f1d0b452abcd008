"""The main job on a real model: quantize by four recipes, load, measure, generate.

    python scripts/demo.py MODEL_DIR OUT_DIR [--only RECIPE]

Calibrates and evaluates on the text that comes with Python, so that nothing is downloaded; the two
parts never overlap. Prints each stage as it begins, each model's perplexity and answer as soon as
they are known, and one table at the end, measured in this run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import smoothq
from smoothq import Recipe, perplexity, preset
from smoothq.data.text import TextSource, evaluation_tokens
from smoothq.data.tokenizer import encode_prompt

RECIPES: dict[str, Recipe] = {
    "W8A8 SmoothQuant": preset("w8a8"),
    "W4A8": preset("w4a8", effort="fast"),
    "W4A4 SmoothRot": preset("w4a4", "smoothrot"),
    "W4A4": preset("w4a4", effort="fast"),
}
FLOAT = "float (bfloat16)"
SAMPLES, LENGTH = 8, 256  # calibration
WINDOWS, WINDOW_LENGTH = 3, 512  # evaluation
QUESTION = "Name the capital of France and one famous building there."
COLUMNS = ("method", "bits per weight", "bits per activation", "directory", "perplexity")
console = Console(highlight=False, soft_wrap=True)
began = time.monotonic()


@dataclass(frozen=True)
class Row:
    """What one model came to: its bits, bytes on the disk, perplexity and greedy answer."""

    bits: tuple[str, str]
    nbytes: int
    perplexity: float
    answer: str


def say(text: str) -> None:
    """Print a line with the seconds since the start, at once."""
    console.print(f"{time.monotonic() - began:5.0f} s  {text}", markup=False)


def directory_bytes(path: Path) -> int:
    """Everything that lies in a checkpoint's directory."""
    return sum(file.stat().st_size for file in path.iterdir())


def answer(model: Any, directory: Path) -> str:
    """A greedy answer to the question, through the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = encode_prompt(tokenizer, QUESTION, chat=True, rows=model.config.vocab_size)
    generated = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())


def quantize(name: str, recipe: Recipe, model: Path, out: Path) -> tuple[str, str]:
    """Write a quantized checkpoint; returns its bits per weight and per activation."""

    def on_progress(block: int, blocks: int, stage: str) -> None:
        if (block, stage) not in told and block % 10 == 0:
            told.add((block, stage))
            say(f"{name}: block {block + 1} of {blocks}, {stage}")

    told: set[tuple[int, str]] = set()
    chosen = recipe.edit(
        calibration__source="builtin",
        calibration__samples=SAMPLES,
        calibration__sequence_length=LENGTH,
    )
    result = smoothq.quantize(
        model,
        chosen,
        output=out,
        overwrite=True,
        device="cpu",
        progress=on_progress,
        check=False,  # it is loaded and measured next
    )
    return f"{result.bits.weight:.2f}", f"{result.bits.activation:.2f}"


def measure(
    name: str, directory: Path, tokens: torch.LongTensor, bits: tuple[str, str] = ("16", "16")
) -> Row:
    """Load a checkpoint and print its perplexity and answer."""
    say(f"{name}: loading {directory}")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    say(f"{name}: perplexity")
    figure = perplexity(model, tokens, WINDOW_LENGTH, WINDOWS).perplexity
    say(f"{name}: perplexity {figure:.2f}; generating")
    row = Row(bits, directory_bytes(directory), figure, answer(model, directory))
    say(f"{name}: {row.answer}")
    return row


def main() -> None:
    """Quantize, load and measure each recipe, then the float model, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=list(RECIPES), help="one recipe instead of all")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    say(f"reading {args.model}")
    tokens = evaluation_tokens(AutoTokenizer.from_pretrained(args.model), TextSource("builtin"))
    rows: dict[str, Row] = {}
    for name, recipe in RECIPES.items():
        if args.only in (None, name):
            say(f"{name}: quantizing")
            directory = args.out / name.lower().replace(" ", "-")
            bits = quantize(name, recipe, args.model, directory)
            rows[name] = measure(name, directory, tokens, bits)
    rows = {FLOAT: measure(FLOAT, args.model, tokens), **rows}

    protocol = f"{WINDOWS} windows of {WINDOW_LENGTH} tokens"
    table = Table(
        title=f"{args.model.name}; perplexity on Python's language reference, held out, {protocol}"
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, row in rows.items():
        table.add_row(name, *row.bits, f"{row.nbytes / 1e6:.1f} MB", f"{row.perplexity:.2f}")
    console.print(table)
    console.print(f"\nGreedy answers to: {QUESTION}")
    for name, row in rows.items():
        console.print(f"  {name}: {row.answer}", markup=False)


if __name__ == "__main__":
    main()
