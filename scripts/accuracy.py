"""The ablation: every method on one model, and docs/benchmarks/accuracy.md's table of it.

    python scripts/accuracy.py --model DIR --text wiki.test.raw --calibration wiki.valid.tokens
    python scripts/accuracy.py --table

A row is a `smoothq quantize` command, run once a seed: quantized into a checkpoint, loaded afresh,
measured through its integer path; nothing is simulated. Each run's figures go to RESULTS as soon as
they are there, and a run whose figures are there already, of the same recipe, is not repeated.
`--only` takes row names, `--list` shows them; `--table` writes the page's table from
RESULTS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from marked import replaced
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from smoothq.data.text import TextSource, evaluation_tokens
from smoothq.errors import RecipeError
from smoothq.evaluation.divergence import agreement, prefill_and_decode
from smoothq.evaluation.perplexity import perplexity
from smoothq.plan.plan import Bits
from smoothq.recipe.recipe import recipe_from_dict
from smoothq.report.figures import activation_bits

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "accuracy.json"
PAGE = ROOT / "docs" / "benchmarks" / "accuracy.md"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
EXAMPLES = "examples"
FLOAT = "float"
SECOND_TEXT = "builtin"  # the evaluation half of Python's language reference
KEPT = ("bits", "bytes_after", "linear_bytes", "causal", "seconds", "peak_memory_bytes")
SECOND_WINDOWS, AGREEMENT_WINDOWS, DECODED_TOKENS = 4, 2, 128


@dataclass(frozen=True)
class Row:
    """A method: the flags of `smoothq quantize` that make it, and how many seeds it is run with."""

    name: str
    flags: tuple[str, ...]
    seeds: int = 1

    @property
    def command(self) -> str:
        """The flags as they stand in a command."""
        return " ".join(self.flags)


def example(name: str) -> tuple[str, ...]:
    """The flags of a recipe file."""
    return ("--recipe", f"{EXAMPLES}/{name}.yaml")


ROWS = [
    Row("W8A8 RTN", ("--w8a8", "--method", "rtn")),
    Row("W8A8 SmoothQuant", ("--w8a8",)),
    Row("W4A16 QuaRot + GPTQ, groups", example("quarot_w4a16"), 3),
    Row("W4A16", ("--w4a16",), 3),
    Row("W4A16, best effort", ("--w4a16", "--effort", "best")),
    Row("W4A8 QuaRot + GPTQ, groups", example("quarot_w4a8"), 3),
    Row("W4A8", ("--w4a8",), 3),
    Row("W4A8, best effort", ("--w4a8", "--effort", "best")),
    Row("W4A4 QuaRot + GPTQ, groups", example("quarot_w4a4"), 3),
    Row("W4A4, fast", ("--w4a4", "--effort", "fast")),
    Row("W4A4", ("--w4a4",), 3),
    Row("W4A4, best effort", ("--w4a4", "--effort", "best")),
    Row("W4A4 QuaRot + GPTQ, per channel and token", ("--w4a4", "--method", "quarot"), 3),
    Row("W4A4 SmoothRot + GPTQ, per channel and token", ("--w4a4", "--method", "smoothrot")),
    Row("W4A4 per channel and token", example("w4a4_channel"), 3),
    Row("W4A4 per channel and token, best effort", example("w4a4_channel_best")),
    Row(
        "W4A4 RRS as published (not causal)",
        ("--w4a4", "--method", "rrs", "--smooth-scope", "live"),
    ),
    Row("FP8", ("--fp8",)),
    Row("FP8, blocks", ("--fp8-block",)),
    Row("MXFP8", ("--mxfp8",)),
    Row("MXFP4, fast", ("--mxfp4", "--effort", "fast")),
    Row("MXFP4", ("--mxfp4",), 3),
    Row("NVFP4, fast", ("--nvfp4", "--effort", "fast")),
    Row("NVFP4", ("--nvfp4",), 3),
    Row("4-bit integers, FP8 inputs", ("--w4a8-fp8",), 3),
    Row("NVFP4 weights", ("--w4a16-nvfp4",), 3),
    Row("W3A16", ("--w3a16",), 3),
    Row("W2A16", ("--w2a16",), 3),
]


class Bench:
    """The float model, the texts, and what is measured on a checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self._text = evaluation_tokens(tokenizer, TextSource(args.text))
        self._second = evaluation_tokens(tokenizer, TextSource(SECOND_TEXT))

    @cached_property
    def _reference(self) -> PreTrainedModel:
        return load(self.args.model)

    def measure(self, directory: str) -> dict[str, float]:
        """Perplexity on both texts, and agreement with the float model and with itself."""
        model, length = load(directory), self.args.evaluation_length
        first = perplexity(model, self._text, length, self.args.windows)
        second = perplexity(model, self._second, length, SECOND_WINDOWS)
        windows = self._text[0, : AGREEMENT_WINDOWS * length].view(AGREEMENT_WINDOWS, length)
        to_float = agreement(model, self._reference, windows)
        decoded = prefill_and_decode(model, self._text[:, :DECODED_TOKENS])
        return {
            "perplexity": round(first.perplexity, 4),
            "second_perplexity": round(second.perplexity, 4),
            "divergence": round(to_float.divergence, 5),
            "top1": round(to_float.top1, 4),
            "decode_divergence": decoded.divergence,
            "decode_top1": decoded.top1,
        }

    def quantize(self, row: Row, seed: int, out: Path, *more: str) -> dict[str, Any]:
        """Run the row's command; the figures that it prints."""
        args = self.args
        command = [
            sys.executable,
            "-m",
            "smoothq",
            "quantize",
            args.model,
            "-o",
            str(out),
            "--json",
        ]
        text = ("--calibration", args.calibration, "--seed", str(seed))
        done = subprocess.run(
            [*command, *row.flags, *text, *more],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures


def load(directory: str) -> PreTrainedModel:
    """A model in float32 outside its integer layers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


class Results:
    """The figures of every run so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Take in what the file holds: another process may measure other rows meanwhile."""
        self.runs = json.loads(self.path.read_text()) if self.path.is_file() else []

    def of(self, name: str) -> list[dict[str, Any]]:
        """A row's runs, by seed."""
        return sorted((run for run in self.runs if run["row"] == name), key=lambda r: r["seed"])

    def put(self, run: dict[str, Any]) -> None:
        """Take in a run in place of an older one of the same row and seed, and store the file."""
        self.read()
        same = (run["row"], run["seed"])
        self.runs = [old for old in self.runs if (old["row"], old["seed"]) != same] + [run]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(self.runs, indent=1) + "\n")
        scratch.replace(self.path)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What figures that stand in one table must share."""
    return {
        "model": Path(args.model).name,
        "text": Path(args.text).name,
        "calibration": Path(args.calibration).name,
        "windows": args.windows,
        "evaluation_length": args.evaluation_length,
    }


def machine() -> dict[str, Any]:
    """Where a run was measured."""
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run_missing(args: argparse.Namespace, rows: list[Row], results: Results) -> None:
    """Measure what the results lack, one seed of every row before the next seed."""
    bench, shared = Bench(args), setting(args)
    if not any(run["setting"] == shared for run in results.of(FLOAT)):
        figures = bench.measure(args.model)
        results.put({"row": FLOAT, "seed": 0, "setting": shared, "machine": machine(), **figures})
    for seed in range(args.seeds):
        for row in (row for row in rows if seed < row.seeds):
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "model"
                recipe = bench.quantize(row, seed, out, "--dry-run")["recipe"]
                recipe["calibration"]["source"] = shared["calibration"]
                known = {"row": row.name, "seed": seed, "setting": shared, "recipe": recipe}
                if any(is_of(run, known) for run in results.runs):
                    continue
                quantized = bench.quantize(row, seed, out)
                run = known | {"command": row.command, "machine": machine()}
                run |= bench.measure(str(out)) | {name: quantized[name] for name in KEPT}
            results.put(run)
            print(row.name, seed, run["perplexity"], flush=True)


def is_of(run: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether a stored run is of this row, seed, setting and recipe.

    Recipes are compared as they are read: a field that came later stands at its default.
    """
    if any(run.get(key) != known[key] for key in ("row", "seed", "setting")):
        return False
    try:
        return recipe_from_dict(run["recipe"]) == recipe_from_dict(known["recipe"])
    except RecipeError:
        return False


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the range where there are several."""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def table(results: Results) -> str:
    """The page's table in Markdown, of the rows that have been run."""
    lines = [
        "| method | `smoothq quantize MODEL` … | bits per weight | bits per activation "
        "| perplexity | second text | KL to float |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results.of(FLOAT):
        first, second = run["perplexity"], run["second_perplexity"]
        lines.append(f"| float32 | | 32 | 32 | {first:.2f} | {second:.2f} | 0 |")
    for row in ROWS:
        runs = results.of(row.name)
        if runs:
            bits = Bits(**runs[0]["bits"])
            cells = [
                row.name,
                f"`{row.command}`",
                f"{bits.weight:.2f}",
                activation_bits(bits, runs[0]["recipe"]["activations"]["bits"]),
                spread([run["perplexity"] for run in runs]),
                spread([run["second_perplexity"] for run in runs]),
                spread([run["divergence"] for run in runs], 3),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(results: Results, page: Path) -> None:
    """Put the table between the page's two marks."""
    page.write_text(replaced(page.read_text(), BEGIN, END, table(results)))


def main() -> None:
    """Measure what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="float model to quantize; without it nothing is measured")
    parser.add_argument("--text", default="wikitext2", help="evaluation text")
    parser.add_argument("--calibration", default="wikitext2", help="calibration text")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--evaluation-length", type=int, default=2048)
    parser.add_argument("--only", nargs="*", help="names of rows; without it all")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many a row")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the page's table")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    args = parser.parse_args()
    logging.disable_progress_bar()
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    if args.list:
        print("\n".join(f"{row.name}: {row.command}" for row in rows))
        return
    results = Results(args.results)
    if args.model:
        run_missing(args, rows, results)
    if args.table:
        write_table(results, args.page)


if __name__ == "__main__":
    main()
