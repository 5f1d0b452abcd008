"""Perplexity of every method on one model: a JSON row each, through saved and reloaded checkpoints.

    python scripts/accuracy.py --model DIR --text wiki.test.raw --calibration wiki.valid.tokens \\
        --windows 12

Each row quantizes the model into a checkpoint, loads it in a fresh module tree and runs the
integer path; nothing is simulated. `--only` takes row names, `--list` shows them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothq import Recipe, preset
from smoothq.calibration import TextSource, evaluation_tokens
from smoothq.checkpoint.stream import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.evaluation.perplexity import perplexity
from smoothq.pipeline import quantize_checkpoint
from smoothq.report import as_dict

SEEDS = (0, 1, 2)


def rows() -> dict[str, list[Recipe]]:
    """Row name → its recipes, one a seed where the rotation's draw matters."""

    def rtn(method: str) -> list[Recipe]:
        recipe = preset("w4a4", method).edit(weights__rounding="rtn")
        return [recipe.edit(seed=seed) for seed in SEEDS]

    return {
        "w8a8 rtn": [preset("w8a8", "rtn")],
        "w8a8 smoothquant": [preset("w8a8")],
        "w8a8 smoothquant, norms only": [preset("w8a8").edit(smoothing__edges=["norms"])],
        "w4a16 default": [preset("w4a16")],
        "w4a8 default": [preset("w4a8")],
        "w4a4 default": [preset("w4a4")],
        "w4a4 quarot rtn": rtn("quarot"),
        "w4a4 smoothrot rtn": rtn("smoothrot"),
        "w4a4 quarot gptq": [preset("w4a4", "quarot")],
        "w4a4 smoothrot gptq": [preset("w4a4", "smoothrot")],
        "w4a4 rrs token gptq": [preset("w4a4", "rrs")],
        "w4a4 rrs live gptq (the paper's)": [preset("w4a4", "rrs", "live")],
        "w4a4 rrs calibrated gptq": [preset("w4a4", "rrs", "calibrated")],
    }


def measure(args: argparse.Namespace, name: str, recipes: list[Recipe]) -> dict[str, object]:
    """One row: every recipe quantized, reloaded and evaluated."""
    values, results = [], []
    for recipe in recipes:
        recipe = recipe.edit(
            calibration__source=args.calibration,
            calibration__samples=args.samples,
            calibration__sequence_length=args.sequence_length,
        )
        with tempfile.TemporaryDirectory() as directory:
            writer = CheckpointWriter(Path(directory) / "model")
            results.append(quantize_checkpoint(open_source(args.model), recipe, writer))
            values.append(evaluate(args, str(writer.out)))
    row = as_dict(results[0])
    return {
        "row": name,
        "perplexity": round(statistics.median(values), 4),
        "seeds": [recipe.seed for recipe in recipes],
        "by_seed": [round(value, 4) for value in values],
        "bits": row["bits"],
        "bytes": row["bytes_after"],
        "linear_bytes": row["linear_bytes"],
        "causal": row["causal"],
        "seconds": [round(result.seconds, 1) for result in results],
        "peak_memory_bytes": max(result.peak_memory for result in results),
    }


def evaluate(args: argparse.Namespace, model: str) -> float:
    """Perplexity of a checkpoint in float32 outside its integer layers."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = evaluation_tokens(AutoTokenizer.from_pretrained(args.model), TextSource(args.text))
    return perplexity(loaded, tokens, args.evaluation_length, args.windows).perplexity


def selected(args: argparse.Namespace) -> Iterator[tuple[str, list[Recipe]]]:
    """The rows that were asked for."""
    for name, recipes in rows().items():
        if not args.only or any(part in name for part in args.only):
            yield name, recipes


def main() -> None:
    """Print a JSON row a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--evaluation-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the row names and stop")
    args = parser.parse_args()
    if args.list:
        print("\n".join(rows()))
        return
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    print(json.dumps({"machine": machine, "threads": torch.get_num_threads()}), flush=True)
    if not args.only or "float" in args.only:
        start = time.perf_counter()
        value = evaluate(args, args.model)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"row": "float", "perplexity": round(value, 4), "seconds": seconds}))
    for name, recipes in selected(args):
        print(json.dumps(measure(args, name, recipes)), flush=True)


if __name__ == "__main__":
    main()
