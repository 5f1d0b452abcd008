"""One linear layer on this CPU: integer operators beside float32 and bfloat16, in turns.

    python scripts/bench_linears.py --output benchmarks/linears.json

Quantizing the input is part of every integer time. Each call takes another matrix of the same
shape, more of them than the caches hold, as the layers of a model do.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from models import Where
from rich.console import Console
from rich.table import Table
from timing import Spread
from torch import Tensor

from smoothq import kernels
from smoothq.kernels import largest_multiplier

SHAPES = {  # (rows, width) of a model's matrices
    "TinyLlama-1.1B": ((2048, 2048), (5632, 2048), (2048, 5632)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
TOKENS = (1, 8, 128, 512)
GROUP = 64
WORD_GROUP = 32  # of codes of 2 and 3 bits
HELD_BYTES = 2**28  # of one kind of matrix: eight times the largest cache that we measured on
MOST_COPIES = 32
WORDS = (2, 3)  # bits of codes in words
FLOATS = ("float32", "bfloat16")
console = Console(width=None if Console().is_terminal else 200, highlight=False)


@dataclass(frozen=True)
class Operands:
    """Matrices of one shape in every form, an input in both float types, and scales."""

    x: Tensor
    floats: dict[str, list[Tensor]]
    codes: list[Tensor]
    packed: list[Tensor]
    words: dict[int, list[Tensor]]
    multiplier: Tensor
    row_scale: Tensor
    channels: Tensor

    @classmethod
    def of(cls, tokens: int, rows: int, width: int) -> Operands:
        """Random ones."""
        copies = min(max(HELD_BYTES // (rows * width), 2), MOST_COPIES)

        def many(low: int, high: int, dtype: torch.dtype, columns: int) -> list[Tensor]:
            return [torch.randint(low, high, (rows, columns), dtype=dtype) for _ in range(copies)]

        words = {bits: many(-(2**31), 2**31, torch.int32, width * bits // 32) for bits in WORDS}
        exact = [torch.randn(rows, width) for _ in range(max(copies // 4, 2))]
        return cls(
            torch.randn(tokens, width),
            {"float32": exact, "bfloat16": [matrix.bfloat16() for matrix in exact]},
            many(-128, 128, torch.int8, width),
            many(0, 256, torch.uint8, width // 2),
            words,
            torch.randint(1, largest_multiplier(4) + 1, (rows, width // GROUP), dtype=torch.int8),
            torch.rand(rows) / 1000,
            torch.randint(1, largest_multiplier(4) + 1, (width,), dtype=torch.int8),
        )

    def contenders(self) -> dict[str, Callable[[], object]]:
        """What a layer runs, by name; every call takes the next matrix."""
        x, half, row_scale = self.x, self.x.bfloat16(), self.row_scale
        full, short = cycle(self.floats["float32"]), cycle(self.floats["bfloat16"])
        codes, packed, step = cycle(self.codes), cycle(self.packed), row_scale.unsqueeze(1)

        def int8(quantized: kernels.QuantizedInput) -> object:
            token_codes, scale, *_ = quantized
            return kernels.int8_gemm(token_codes, scale, next(codes), row_scale, None, x.dtype)

        def int4() -> object:
            token_codes, scale, *_ = kernels.quantize_per_token(x, 8)
            operands = (next(packed), row_scale, self.multiplier, None, x.dtype)
            return kernels.int4_gemm(token_codes, scale, *operands)

        return {
            "float32": lambda: F.linear(x, next(full)),
            "bfloat16": lambda: F.linear(half, next(short)),
            "W8A8": lambda: int8(kernels.quantize_per_token(x, 8)),
            "A4 by `token`": lambda: int8(kernels.quantize_token_groups(x, 4, GROUP)),
            "A4 by `calibrated`": lambda: int8(kernels.quantize_smoothed(x, self.channels, 4)),
            "W4A8 packed": int4,
            "W4A16": lambda: kernels.weight_only_gemm(
                x, next(packed), step, self.multiplier, None, 4
            ),
            **self.floating(x, ""),
            **self.floating(half, ", bfloat16 in"),
        }

    def floating(self, x: Tensor, name: str) -> dict[str, Callable[[], object]]:
        """Floating-point codes, and codes of 2 and 3 bits, by an input that stays a float."""
        rows, width = len(self.row_scale), x.shape[1]
        codes = cycle([matrix.view(torch.uint8) for matrix in self.codes])
        packed = cycle(self.packed)
        e8m0 = torch.randint(110, 128, (rows, width // 32), dtype=torch.uint8)
        e4m3 = torch.randint(1, 126, (rows, width // 16), dtype=torch.uint8)
        per_row, per_tensor = self.row_scale.unsqueeze(1), torch.rand(1) / 1000
        per_group = torch.rand(rows, width // WORD_GROUP).bfloat16()
        words = {bits: cycle(self.words[bits]) for bits in WORDS}
        return {
            f"E4M3{name}": lambda: kernels.fp_gemm(x, next(codes), per_row, None, None, "e4m3"),
            f"MXFP4{name}": lambda: kernels.fp_gemm(x, next(packed), e8m0, None, None, "e2m1"),
            f"NVFP4{name}": lambda: kernels.fp_gemm(
                x, next(packed), e4m3, per_tensor, None, "e2m1"
            ),
            f"W2A16{name}": lambda: kernels.weight_only_gemm(
                x, next(words[2]), per_group, None, None, 2
            ),
            f"W3A16{name}": lambda: kernels.weight_only_gemm(
                x, next(words[3]), per_group, None, None, 3
            ),
        }


def measure(
    tokens: int, rows: int, width: int, repetitions: int, only: Iterable[str] = ("",)
) -> dict[str, Spread]:
    """Seconds of every contender, in turns; the first round is thrown away.

    only: parts of names; floats always run.
    """
    contenders = {
        name: run
        for name, run in Operands.of(tokens, rows, width).contenders().items()
        if name in FLOATS or any(part in name for part in only)
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions + 1):
        # Nobody always comes after the same neighbour, and finds the caches as that one left them.
        for name in random.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Spread.of(values[1:]) for name, values in seconds.items()}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Microseconds, and how many times as fast as float32 and as bfloat16."""
    table = Table("layer", "tokens", *rows[0]["seconds"])
    for row in rows:
        cells = []
        for name, spread in row["seconds"].items():
            ratios = ", ".join(f"{row['speedup'][name][other]:.2f}" for other in FLOATS)
            cells.append(f"{spread['median'] * 1e6:.0f} ({ratios})")
        table.add_row(f"{row['rows']} x {row['width']}", str(row["tokens"]), *cells)
    return table


@torch.no_grad()
def main(
    repetitions: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 20,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "TinyLlama-1.1B",
    tokens: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Forms whose name contains this; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Measure, print a table of microseconds (times float32, bfloat16), and write JSON."""
    torch.manual_seed(0)
    where = Where(torch.device("cpu"), torch.float32)
    rows = []
    for shape in SHAPES[model]:
        for count in tokens or TOKENS:
            found = measure(count, *shape, repetitions, only or [""])
            speedup = {
                name: {other: found[other].median / spread.median for other in FLOATS}
                for name, spread in found.items()
            }
            seconds = {name: asdict(spread) for name, spread in found.items()}
            row = {"rows": shape[0], "width": shape[1], "tokens": count}
            rows.append({**row, "seconds": seconds, "speedup": speedup})
    console.print(f"{where.name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print("microseconds (times float32, bfloat16), quantizing the input included")
    console.print(table_of(rows))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        machine = {"device": where.name, "threads": torch.get_num_threads()}
        results = {**machine, "torch": torch.__version__, "rows": rows}
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
