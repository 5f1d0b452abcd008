"""Kill a quantization at random moments, resume it, and compare what comes out bit by bit.

    python scripts/soak.py                # 20 kills of a run that calibrates, rounds by GPTQ, tunes
    python scripts/soak.py --kills 3 --seed 7

A run is a process of its own, killed by SIGKILL somewhere between its first and its last act, and
started again with the same arguments. Prints how many were resumed and how many are identical.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from models import Where, random_float_model
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig

from smoothq import Recipe, preset
from smoothq.checkpoint.open import open_source
from smoothq.checkpoint.writer import CheckpointWriter
from smoothq.pipeline.run import quantize_checkpoint

TOKENS = (8, 256)  # samples and their length
SHARD_BYTES = 1 << 20  # so that there are several
FORK = multiprocessing.get_context("fork")  # nothing is imported anew
console = Console(highlight=False)
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def recipe() -> Recipe:
    """Everything that a state must carry over: GPTQ, smoothing, tuning's two streams."""
    return preset("w4a4").edit(weights__group_size=32, tuning__steps=4)


def make_model(directory: Path, layers: int) -> None:
    """A small model with random weights."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    random_float_model(config, Where(torch.device("cpu"), torch.bfloat16)).save_pretrained(
        directory
    )


def child(model: Path, out: Path, begins: Connection) -> None:
    """One run, which says when it begins."""
    # Once more after the fork, before a model is loaded in several threads: the first to need
    # PyTorch's pool in a forked process makes it anew, and meanwhile another would find none.
    torch.set_num_threads(1)
    source = open_source(model)
    data = torch.randint(512, TOKENS, generator=torch.Generator().manual_seed(1))
    begins.send(True)
    quantize_checkpoint(source, recipe(), CheckpointWriter(out, shard_bytes=SHARD_BYTES), data=data)


def run(model: Path, out: Path, kill_after: float | None = None) -> float:
    """Seconds that a run took from its beginning, to its end or until it is killed."""
    begun, begins = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(model, out, begins))
    process.start()
    begins.close()  # the child has its own: where it ends without a word, the wait ends too
    with suppress(EOFError):
        begun.recv()
    start = time.perf_counter()
    process.join(kill_after)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit("a run failed")
    return time.perf_counter() - start


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


@app.command()
def soak(
    kills: Annotated[int, typer.Option(help="Runs to kill.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    layers: Annotated[int, typer.Option(help="Blocks of the model.", min=1)] = 12,
) -> None:
    """Kill and resume, and print what came of it."""
    torch.set_num_threads(1)  # a forked process has no others
    moments = random.Random(seed)
    resumed = identical = before_state = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        make_model(model, layers)
        seconds = run(model, out)
        expected = digests(out)
        for _ in track(range(kills), "killing", console=console, transient=True):
            shutil.rmtree(out)
            run(model, out, kill_after=moments.uniform(0, seconds))
            before_state += not (Path(scratch) / "out.partial" / "state.json").exists()
            if not out.exists():
                run(model, out)
            resumed += out.exists() and not (Path(scratch) / "out.partial").exists()
            identical += digests(out) == expected
    console.print(
        f"a run of {seconds:.1f} s in {layers} blocks; {before_state} kills came before a block "
        "was kept, or after the last act"
    )
    console.print(f"{resumed} resumed, {identical} identical")
    if not resumed == identical == kills:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
