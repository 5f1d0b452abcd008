"""Write docs/benchmarks/speed.md's tables of CPU speed from what `make bench` measured.

python scripts/speed_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from marked import replaced

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "benchmarks" / "speed.md", ROOT / "benchmarks"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
FLOATS = ("float32", "bfloat16")


def line(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(cells: list[str]) -> list[str]:
    """A table's first two lines."""
    return [line(cells), "|" + "---|" * len(cells)]


def linears(results: dict[str, Any]) -> list[str]:
    """How many times as fast as float32 and as bfloat16 a layer is, with quantizing its input."""
    names = [name for name in results["rows"][0]["speedup"] if name not in FLOATS]
    lines = head(["layer", "tokens", *names])
    for row in results["rows"]:
        cells = [" / ".join(f"{row['speedup'][name][one]:.1f}" for one in FLOATS) for name in names]
        lines.append(line([f"{row['rows']} by {row['width']}", str(row["tokens"]), *cells]))
    return lines


def models(results: dict[str, Any]) -> list[str]:
    """Tokens a second of a whole model, and how many times as fast as its float ones."""
    tasks, found = [task["name"] for task in results["tasks"]], results["contenders"]
    lines = head([f"{results['size']} Llama", *tasks, "of the byte bound", "peak memory, GB"])
    for name, one in found.items():
        cells = []
        for task in tasks:
            speed = one["tokens_a_second"].get(task, 0.0)
            times = [speed / found[other]["tokens_a_second"][task] for other in FLOATS]
            ratios = " / ".join(f"{ratio:.1f}" for ratio in times)
            cells.append(f"{speed:.1f} ({ratios})" if speed else "")
        share, memory = one["of_byte_bound"], one["memory"]
        cells.append("" if share is None else f"{share:.0%}")
        cells.append("" if memory is None else f"{memory['peak'] / 1e9:.2f}")
        lines.append(line([name, *cells]))
    return lines


def tables() -> str:
    """All of them, with the machine's name above."""
    layers, *whole = (
        json.loads((RESULTS / f"cpu-{name}.json").read_text())
        for name in ("linears", "1.1b", "135m")
    )
    where = f"{layers['device']}, {layers['threads']} threads, PyTorch {layers['torch']}"
    parts = [
        f"One linear layer, times float32 / times bfloat16 ({where}):",
        *blank(linears(layers)),
    ]
    for results in whole:
        bandwidth = results["bandwidth"]["median"] / 1e9
        parts.append(
            "Tokens a second of a whole model with random weights "
            f"(times float32 / times bfloat16; memory read at {bandwidth:.0f} GB/s):"
        )
        parts += blank(models(results))
    return "\n".join(parts).strip()


def blank(lines: list[str]) -> list[str]:
    """A table with its empty lines around it."""
    return ["", *lines, ""]


def written(text: str) -> str:
    """The page's text with the tables of today between its two marks."""
    return replaced(text, BEGIN, END, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
