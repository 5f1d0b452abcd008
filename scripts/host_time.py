"""Time what a call of a GPU operator costs on the host: everything but the kernel itself.

    python scripts/host_time.py

A driver that launches nothing stands in for the GPU's, so that none need be there: kernels are
compiled for a target, and operators are called as a model calls them, on tensors of the CPU. What
is left is the time of Python and of Triton's launcher. Decode steps of small models are bound by
it, unless CUDA graphs are used.
"""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from compile_kernels import CHIPS, CompilingDriver

from smoothq import kernels
from smoothq.kernels.triton import launch

WIDTH, GROUP, HEADS, HEAD_DIM = 4096, 128, 8, 128
CALLS = 200  # of an operator, between two looks at the clock
DTYPE = torch.bfloat16
MULTIPROCESSORS = 132  # an H100's: by their number the launchers split a product


def operators(tokens: int) -> dict[str, Callable[[], Any]]:
    """The operators by name, each called with the operands of a decode step."""
    x, rows = (torch.ones(*shape, WIDTH, dtype=DTYPE) for shape in ((1, tokens), (tokens,)))
    codes, scale = torch.zeros(tokens, WIDTH, dtype=torch.int8), torch.ones(tokens, 1)
    weight, row_scale = torch.zeros(WIDTH, WIDTH, dtype=torch.int8), torch.ones(WIDTH)
    packed = torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8)
    multiplier = torch.ones(WIDTH, WIDTH // GROUP, dtype=torch.int8)
    per_group = torch.ones(WIDTH, WIDTH // GROUP, dtype=DTYPE)
    heads = torch.ones(1, HEADS, tokens, HEAD_DIM, dtype=DTYPE)
    return {
        "quantize_per_token": lambda: kernels.quantize_per_token(x, 8),
        "quantize_token_groups": lambda: kernels.quantize_token_groups(x, 4, GROUP),
        "int8_gemm": lambda: kernels.int8_gemm(codes, scale, weight, row_scale, None, DTYPE),
        "int4_gemm": lambda: kernels.int4_gemm(
            codes, scale, packed, row_scale, multiplier, None, DTYPE
        ),
        "weight_only_gemm": lambda: kernels.weight_only_gemm(
            rows, packed, per_group, None, None, 4
        ),
        "quantize_heads": lambda: kernels.quantize_heads(heads, 8, None),
    }


def microseconds(run: Callable[[], Any], repetitions: int) -> list[float]:
    """The processor's time of one call, in µs, over the repetitions."""
    found = []
    for _ in range(repetitions):
        start = time.thread_time()
        for _ in range(CALLS):
            run()
        found.append((time.thread_time() - start) / CALLS * 1e6)
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of a call.")] = 1,
    repetitions: Annotated[int, typer.Option(help=f"Of {CALLS} calls each.")] = 15,
    target: Annotated[str, typer.Option(help=f"One of {', '.join(CHIPS)}.")] = "sm_90",
    only: Annotated[str, typer.Option(help="Operators whose name contains this.")] = "",
    output: Annotated[Path | None, typer.Option(help="Also write the medians here.")] = None,
) -> None:
    """Print the median and the least time of a call, in µs, for each operator."""
    if launch.INTERPRETED:
        raise typer.BadParameter("unset TRITON_INTERPRET: the interpreter launches nothing")
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(CompilingDriver(CHIPS[target]))
    kernels._BACKENDS["cpu"] = "triton"
    for name in ("integer_gemm", "attention"):  # modules: the package has operators of these names
        launcher: Any = importlib.import_module(f"smoothq.kernels.triton.{name}")
        launcher.multiprocessors = lambda device: MULTIPROCESSORS
    medians = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache  # timings found here must reach no real cache
        for name, run in operators(tokens).items():
            if only in name:
                microseconds(run, 2)  # compiles, and chooses a tile
                found = microseconds(run, repetitions)
                medians[name] = statistics.median(found)
                print(f"{name:24}{medians[name]:8.1f} µs{min(found):8.1f} at least", flush=True)
    if output is not None:
        output.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
