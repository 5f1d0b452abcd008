"""What quantizing models of several sizes takes: measured, or computed as before a run.

    python scripts/needs.py measure llama-3.2-3b      # writes it with random weights, quantizes it
    python scripts/needs.py compute llama-3.1-70b
    python scripts/needs.py depth llama-3.2-3b 12 48  # peaks of models of other depths
    python scripts/needs.py experts tinyllama-1.1b 4 16 --experts 32 --experts 64  # of mixtures
    python scripts/needs.py table                     # docs/benchmarks/needs.md's

Peak memory is the process's, libraries included; disk is the most that the output took on its way.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from make_random_model import Shapes, config_of, write_random_model
from marked import replaced
from models import Where, skeleton
from rich.console import Console

from smoothq import Recipe, preset
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.pipeline.estimate import estimate_resources, estimate_time
from smoothq.pipeline.run import quantize_checkpoint
from smoothq.plan.resolve import make_plan
from smoothq.report.results import duration_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "needs.md"
RESULTS = ROOT / "benchmarks" / "needs.json"
BEGIN, END = "<!-- needs: begin -->", "<!-- needs: end -->"
TEXT = {"calibration__samples": 16, "calibration__sequence_length": 512}
RECIPES: dict[str, Recipe] = {
    "W4A4 RRS, to nearest": preset("w4a4", "rrs").edit(weights__rounding="rtn"),
    "W4A4 RRS, GPTQ": preset("w4a4", "rrs").edit(**TEXT),
}
console = Console(highlight=False)
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(hidden=True)
def run(model: Path, out: Path, recipe: str) -> None:
    """One run in this process; prints its figures as JSON."""
    shape = (TEXT["calibration__samples"], TEXT["calibration__sequence_length"])
    source = open_source(model)
    data = torch.randint(source.config.vocab_size, shape)
    result = quantize_checkpoint(source, RECIPES[recipe], CheckpointWriter(out), data=data)
    figures = {
        "before": result.bytes_before,
        "after": result.bytes_after,
        "memory": result.peak_memory,
        "seconds": result.seconds,
    }
    print(json.dumps(figures))


def measured(model: Path, out: Path, recipe: str) -> dict[str, float]:
    """A run in a process of its own, and the most that its output took of the disk."""
    ended, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.2):
            most = max(most, sum(_size(path) for path in out.parent.glob(f"{out.name}*/**/*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command = [sys.executable, __file__, "run", str(model), str(out), recipe]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    finally:
        ended.set()
        watcher.join()
    return {**json.loads(done.stdout), "disk": most}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # renamed or removed meanwhile
        return 0


def computed(shapes: Shapes, recipe: str) -> dict[str, float]:
    """What a run says of itself before it starts."""
    model = skeleton(config_of(shapes, None), torch.bfloat16)
    plan = make_plan(model, RECIPES[recipe])
    needs = estimate_resources(plan)
    return {
        "before": sum(parameter.nbytes for parameter in model.parameters()),
        "after": plan.total_bytes,
        "memory": needs.memory,
        "disk": needs.disk,
        "seconds": estimate_time(plan, torch.device("cpu")).seconds,
    }


def known() -> dict[str, Any]:
    """All figures so far: rows by model and recipe."""
    found: dict[str, Any] = {"machine": "", "rows": {}}
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else found


def keep(shapes: Shapes, recipe: str, how: str, figures: dict[str, float]) -> None:
    """Write a row down."""
    results = known()
    results["machine"] = f"{Where.here().name}, {torch.get_num_threads()} threads"
    results["rows"][f"{shapes.value}: {recipe}"] = {"how": how, **figures}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    console.print(row(shapes.value, recipe, how, figures))


def row(model: str, recipe: str, how: str, figures: dict[str, float]) -> str:
    """A line of the table."""
    sizes = [f"{figures[key] / 1e9:.2f}" for key in ("before", "after", "memory", "disk")]
    return f"| {' | '.join([model, recipe, *sizes, duration_text(figures['seconds']), how])} |"


@app.command()
def measure(shapes: Shapes, only: str | None = None) -> None:
    """Quantize a model of a size by every recipe, or by one."""
    with tempfile.TemporaryDirectory(prefix="needs-") as scratch:
        model = Path(scratch) / "float"
        write_random_model(model, config_of(shapes, None))
        for number, recipe in enumerate(RECIPES if only is None else [only]):
            keep(shapes, recipe, "measured", measured(model, Path(scratch) / f"{number}", recipe))


@app.command()
def compute(shapes: list[Shapes]) -> None:
    """Say what quantizing models of some sizes would take."""
    for each in shapes:
        for recipe in RECIPES:
            keep(each, recipe, "computed", computed(each, recipe))


@app.command()
def depth(shapes: Shapes, layers: list[int]) -> None:
    """Print the peak memory of a size's first recipe by the number of layers."""
    recipe = next(iter(RECIPES))
    for count in layers:
        with tempfile.TemporaryDirectory(prefix="needs-") as scratch:
            model = Path(scratch) / "float"
            write_random_model(model, config_of(shapes, count))
            figures = measured(model, Path(scratch) / "out", recipe)
            console.print(f"{count} layers: {figures['memory'] / 1e9:.3f} GB")


@app.command()
def experts(
    shapes: Shapes,
    layers: list[int],
    counts: Annotated[list[int], typer.Option("--experts", help="In a layer; repeatable.")],
) -> None:
    """Print the peak memory of a size's first recipe by the numbers of layers and of experts."""
    recipe = next(iter(RECIPES))
    for blocks, count in itertools.product(layers, counts):
        with tempfile.TemporaryDirectory(prefix="needs-") as scratch:
            model = Path(scratch) / "float"
            write_random_model(model, config_of(shapes, blocks, count))
            figures = measured(model, Path(scratch) / "out", recipe)
            memory = figures["memory"] / 1e9
            console.print(f"{blocks} layers, {count} experts: {memory:.3f} GB")


def written(text: str) -> str:
    """The page's text with the table of today between its two marks."""
    results = known()
    lines = [
        f"On {results['machine']}, random weights in bfloat16:",
        "",
        "| model | recipe | GB before | GB after | GB of memory | GB of disk | time | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for shapes in Shapes:
        for recipe in RECIPES:
            found = results["rows"].get(f"{shapes.value}: {recipe}")
            if found is not None:
                lines.append(row(shapes.value, recipe, found["how"], found))
    return replaced(text, BEGIN, END, "\n".join(lines))


@app.command()
def table() -> None:
    """Write the table of docs/benchmarks/needs.md."""
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    app()
