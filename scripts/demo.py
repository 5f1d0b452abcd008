"""The main job on a real model: quantize by five recipes, load, measure, generate.

    python scripts/demo.py MODEL_DIR OUT_DIR

Calibrates and evaluates on the text that comes with Python, so that nothing is downloaded; the two
parts never overlap. Prints one table, measured in this run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from smoothq import Recipe, perplexity, preset
from smoothq.checkpoint.source import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.data.text import TextSource, evaluation_tokens
from smoothq.pipeline.run import quantize_checkpoint

RECIPES: dict[str, Recipe] = {
    "W8A8 SmoothQuant": preset("w8a8"),
    "W4A8": preset("w4a8", effort="fast"),
    "W4A4 SmoothRot": preset("w4a4", "smoothrot"),
    "W4A4 RRS": preset("w4a4", effort="fast"),
}
SAMPLES, LENGTH = 16, 512
WINDOWS, WINDOW_LENGTH = 8, 1024
QUESTION = "Name the capital of France and one famous building there."


def directory_bytes(path: Path) -> int:
    """Everything that lies in a checkpoint's directory."""
    return sum(file.stat().st_size for file in path.iterdir())


def answer(model: PreTrainedModel, directory: Path) -> str:
    """A greedy answer to the question, through the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text: str = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], True)
    return " ".join(text.split())


def main() -> None:
    """Quantize, load and measure each recipe, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokens = evaluation_tokens(AutoTokenizer.from_pretrained(args.model), TextSource("builtin"))
    protocol = f"{WINDOWS} windows of {WINDOW_LENGTH} tokens"
    table = Table(
        title=f"{args.model.name}; perplexity on Python's language reference, held out, {protocol}"
    )
    for column in ("method", "bits per weight", "bits per activation", "directory", "perplexity"):
        table.add_column(column, justify="left" if column == "method" else "right")
    answers = {}
    with Progress() as progress:
        task = progress.add_task("", total=len(RECIPES) + 1)

        def measure(name: str, directory: Path, bits: tuple[str, str]) -> None:
            progress.update(task, description=f"{name}: perplexity")
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            figure = perplexity(model, tokens, WINDOW_LENGTH, WINDOWS).perplexity
            size = f"{directory_bytes(directory) / 1e6:.1f} MB"
            table.add_row(name, *bits, size, f"{figure:.2f}")
            answers[name] = answer(model, directory)
            progress.advance(task)

        measure("float (bfloat16)", args.model, ("16", "16"))
        for name, recipe in RECIPES.items():
            progress.console.print(f"quantizing: {name}")

            def on_progress(block: int, blocks: int, stage: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: block {block + 1}/{blocks}, {stage}")

            directory = args.out / name.lower().replace(" ", "-")
            chosen = recipe.edit(
                calibration__source="builtin",
                calibration__samples=SAMPLES,
                calibration__sequence_length=LENGTH,
            )
            writer = CheckpointWriter(directory, overwrite=True)
            result = quantize_checkpoint(
                open_source(args.model), chosen, writer, progress=on_progress
            )
            bits = (f"{result.bits.weight:.2f}", f"{result.bits.activation:.2f}")
            measure(name, directory, bits)
    console = Console()
    console.print(table)
    console.print(f"\nGreedy answers to: {QUESTION}")
    for name, text in answers.items():
        console.print(f"  {name}: {text}", highlight=False)


if __name__ == "__main__":
    main()
