"""One block of a mixture on this CPU beside the same block with a dense MLP of as much work.

    python scripts/bench_experts.py --output benchmarks/experts.json

The dense MLP is as wide as the experts of one token together, so that both read as many bytes a
token; what a mixture takes longer is its router, and how its experts are brought together. Blocks
of random weights decode a token each, in turns, behind a short context; each call takes the next of
several blocks, more of them than the caches hold.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from models import Where, random_quantized_model
from rich.console import Console
from rich.table import Table
from timing import Spread
from torch import nn
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from smoothq import preset
from smoothq.recipe.recipe import Preset

console = Console(width=None if Console().is_terminal else 140, highlight=False)
HEAD = 128


def configs_of(
    hidden: int, width: int, experts: int, chosen: int, blocks: int
) -> dict[str, PretrainedConfig]:
    """A mixture, and the dense model beside it."""
    common: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": max(1, hidden // HEAD),
        "num_key_value_heads": max(1, hidden // HEAD // 4),
        "head_dim": HEAD,
    }
    routed: dict[str, Any] = {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
    }
    return {
        "mixture": Qwen3MoeConfig(**common, **routed, intermediate_size=width),
        "dense": Qwen3Config(**common, intermediate_size=chosen * width),
    }


def steps_of(config: PretrainedConfig, name: str, batch: int) -> Callable[[], object]:
    """Decode one token a sequence with the next block of a model."""
    where = Where(torch.device("cpu"), torch.float32)
    # What is folded into weights does not change the time.
    recipe = preset(cast(Preset, name)).edit(tuning=None)
    model: Any = random_quantized_model(config, recipe, where)
    inputs = torch.randn(batch, 1, config.hidden_size)
    positions = model.model.rotary_emb(inputs, torch.zeros(batch, 1, dtype=torch.long))
    blocks: cycle[nn.Module] = cycle(model.model.layers)
    return lambda: next(blocks)(inputs, position_embeddings=positions, attention_mask=None)


def measure(contenders: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Spread]:
    """Seconds of every contender, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions + 10):
        for name in random.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Spread.of(values[10:]) for name, values in seconds.items()}


@torch.no_grad()
def main(  # noqa: PLR0917
    presets: Annotated[list[str] | None, typer.Option("--preset", help="Repeatable.")] = None,
    hidden: Annotated[int, typer.Option(help="Width of the block.", min=HEAD)] = 1024,
    width: Annotated[int, typer.Option(help="Of an expert.", min=16)] = 512,
    experts: Annotated[int, typer.Option(help="In a block.", min=1)] = 64,
    chosen: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    blocks: Annotated[int, typer.Option(help="That take turns.", min=1)] = 4,
    repetitions: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 300,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Measure, print a table of microseconds, and write JSON."""
    torch.manual_seed(0)
    random.seed(0)
    where, rows = Where(torch.device("cpu"), torch.float32), []
    table = Table("preset", "mixture", "dense", "times")
    for name in presets or ("w8a8", "w4a8"):
        contenders = {
            kind: steps_of(config, name, batch)
            for kind, config in configs_of(hidden, width, experts, chosen, blocks).items()
        }
        spreads = measure(contenders, repetitions)
        medians = [spreads[kind].median for kind in ("mixture", "dense")]
        times = medians[0] / medians[1]
        rows.append({"preset": name, "times": times} | {k: asdict(s) for k, s in spreads.items()})
        table.add_row(name, *(f"{1e6 * seconds:.0f} us" for seconds in medians), f"{times:.2f}")
    shape = {"hidden": hidden, "width": width, "experts": experts, "chosen": chosen, "batch": batch}
    machine = {"device": where.name, "threads": torch.get_num_threads()}
    console.print(f"{where.name}, {machine['threads']} threads, {shape}")
    console.print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        results = {**machine, "torch": torch.__version__, **shape, "rows": rows}
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
