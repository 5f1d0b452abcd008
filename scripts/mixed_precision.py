"""What extra bits are worth: spread evenly, spent on the first blocks, or where they save most.

    python scripts/mixed_precision.py --model DIR --text wiki.test.raw \
        --calibration wiki.valid.tokens

All rows but the first two take the same bits a weight: those of the preset in groups of 16 instead
of 32. The sensitivities are measured on the calibration text. Every row is a checkpoint, loaded
afresh and measured through its integer path, as in scripts/accuracy.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from accuracy import FLOAT, Bench
from transformers.utils import logging

from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.source import Source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.data.text import TextSource, calibration_tokens
from smoothq.inspection.sensitivity import (
    Choice,
    Sensitivities,
    measure,
    mixed_recipe,
    with_choices,
)
from smoothq.pipeline.run import quantize_checkpoint
from smoothq.plan.resolve import make_plan
from smoothq.recipe.presets import preset
from smoothq.recipe.recipe import Recipe


def recipes(found: Sensitivities, base: Recipe, finer: Recipe, bits: float) -> dict[str, Recipe]:
    """The rows: the base, and three ways to spend up to so many bits a weight."""
    return {
        "groups of 32": base,
        "groups of 16": finer,
        "first blocks in 8 bits": with_choices(base, found, first_blocks(found, bits)),
        "mixed by sensitivity": mixed_recipe(found, base, bits),
    }


def first_blocks(found: Sensitivities, bits: float) -> list[Choice]:
    """8 bits for each site from the first block on, as long as it fits so many bits a weight."""
    chosen = found.asked
    for index, unit in enumerate(found.units):
        richer = [*chosen[:index], unit.choices[-1], *chosen[index + 1 :]]
        if found.bits_with(richer) <= bits:
            chosen = richer
    return chosen


def rows(args: argparse.Namespace, source: Source) -> Iterator[str]:
    """The table's lines, each as soon as it has been measured."""
    bench = Bench(args)
    base = preset(args.preset).edit(calibration__source=args.calibration)
    if not args.full:
        base = base.edit(weights__rounding="rtn", tuning=None)
    finer = base.edit(weights__group_size=16)
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    text = TextSource(args.calibration)
    samples, length = args.measured
    tokens = calibration_tokens(tokenizer, text, samples, length, base.seed)
    start = time.perf_counter()
    found = measure(source, base, tokens)
    yield f"sensitivities: {len(found.units)} units, {time.perf_counter() - start:.0f} s\n"
    for unit in found.ranked[:10]:
        yield f"    block {unit.block:2} {unit.site:8} KL {unit.asked.divergence:.5f}"
    yield "\n| weights | bits per weight | perplexity | second text | KL to float |"
    yield "|---|---|---|---|---|"
    yield line(FLOAT, 32, bench.measure(args.model))
    bits = make_plan(source.skeleton(), finer).bits.weight
    for name, recipe in recipes(found, base, finer, bits).items():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "model"
            result = quantize_checkpoint(source, recipe, CheckpointWriter(out))
            yield line(name, result.bits.weight, bench.measure(str(out)))


def line(name: str, bits: float, figures: dict[str, float]) -> str:
    """A row of the table in Markdown."""
    first, second = figures["perplexity"], figures["second_perplexity"]
    divergence = figures["divergence"]
    return f"| {name} | {bits:.3f} | {first:.3f} | {second:.3f} | {divergence:.4f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="float model to quantize")
    parser.add_argument("--text", default="wikitext2", help="evaluation text")
    parser.add_argument("--calibration", default="wikitext2", help="calibration text")
    parser.add_argument("--preset", default="w4a16", choices=["w4a16", "w4a8", "w4a4"])
    parser.add_argument("--full", action="store_true", help="GPTQ and tuning, as the preset has it")
    parser.add_argument(
        "--measured",
        type=int,
        nargs=2,
        default=(2, 512),
        metavar=("WINDOWS", "LENGTH"),
        help="calibration text on which sensitivities are measured",
    )
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--evaluation-length", type=int, default=2048)
    args = parser.parse_args()
    logging.disable_progress_bar()
    for each in rows(args, open_source(args.model)):
        print(each, flush=True)


if __name__ == "__main__":
    main()
