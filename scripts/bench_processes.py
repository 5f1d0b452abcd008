"""Calibration by one process of one thread and by two, in turns: seconds, and the same result?

    python scripts/bench_processes.py compare
    python scripts/bench_processes.py compare --layers 8 --repetitions 5 --rounding gptq

A model of TinyLlama's shapes with random weights is quantized to static W8A8 with SmoothQuant, or
to W4A16 by GPTQ. Timed is all that a block takes but for loading it: what calibrates and rounds it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from make_random_model import Shapes, config_of, write_random_model
from rich.console import Console
from safetensors.torch import load_file

from smoothq import Recipe, preset
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.pipeline.run import quantize_checkpoint

TOKENS = (16, 512)
Rounding = Literal["static", "gptq"]
console = Console(highlight=False)
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def recipe_of(rounding: Rounding) -> Recipe:
    """Statistics that are maxima, or sums."""
    if rounding == "gptq":
        return preset("w4a16", "quarot")
    return preset("w8a8").edit(activations__static=True, activations__granularity="tensor")


class Stopwatch:
    """Adds up the seconds of every stage of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "load", time.perf_counter()

    def __call__(self, block: int, blocks: int, stage: str) -> None:
        """Stop the clock of the stage that ends."""
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


@app.command(hidden=True)
def run(model: Path, out: Path, rounding: Rounding) -> None:
    """One of the processes of a run; the leading one prints the seconds."""
    source, watch = open_source(model), Stopwatch()
    data = torch.randint(32000, TOKENS, generator=torch.Generator().manual_seed(1))
    quantize_checkpoint(
        source, recipe_of(rounding), CheckpointWriter(out, resume=False), data=data, progress=watch
    )
    watch(0, 0, "end")
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(sum(s for stage, s in watch.seconds.items() if stage != "load")))


def seconds_of(processes: int, model: Path, out: Path, rounding: Rounding) -> float:
    """Of a run by so many processes of one thread."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, __file__, "run", str(model), str(out), rounding],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def differing(one: Path, two: Path) -> float:
    """The share of all numbers in which two checkpoints differ."""
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    moved = sum(int((tensor != second[name]).sum()) for name, tensor in first.items())
    return moved / sum(tensor.numel() for tensor in first.values())


@app.command()
def compare(
    layers: Annotated[int, typer.Option(help="Of the model.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Of each.")] = 3,
    rounding: Annotated[Rounding, typer.Option(help="Maxima, or GPTQ's sums.")] = "static",
) -> None:
    """Measure in turns, and print the ratio of medians."""
    with tempfile.TemporaryDirectory(prefix="processes-") as scratch:
        model = Path(scratch) / "float"
        write_random_model(model, config_of(Shapes.TINYLLAMA, layers))
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(repetitions):
            outs = {count: Path(scratch) / f"{turn}-{count}" for count in seconds}
            for count, out in outs.items():
                seconds[count].append(seconds_of(count, model, out, rounding))
            share = differing(*outs.values())
        one, two = (statistics.median(found) for found in seconds.values())
    console.print(f"one process {one:.1f} s, two {two:.1f} s: {two / one:.2f} times")
    console.print(f"the results differ in {share:.6%} of their numbers")


if __name__ == "__main__":
    app()
