"""Prefill, decode and memory of a whole model with random weights, quantized beside float.

    python scripts/bench_model.py --preset w4a8                      # a GPU: Llama-3-8B's shape
    python scripts/bench_model.py --size 1.1b --preset w8a8 --preset w4a8 --head-8
    python scripts/bench_model.py --size 1.1b --rivals .rivals       # `make rivals` puts them there

Speed does not depend on what weights say, so that no checkpoint is needed: a quantized model has
the modules that its preset's plan installs, filled with random codes. On a GPU each forward is one
CUDA graph over a static cache, beside bfloat16; on a CPU it runs eagerly over the cache that
`generate` takes, beside float32 and bfloat16, and beside other engines in processes of their own.
All take turns, unless memory holds only one at a time. A decode step reads every weight once: its
table says which share of the time that takes by the bandwidth measured between the turns.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import transformers
import typer
from models import (
    Size,
    Where,
    config_of,
    proc_bytes,
    random_float_model,
    random_quantized_model,
    skeleton,
)
from rich.console import Console
from rich.table import Table
from timing import Spread, as_graph, slug
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, StaticCache

from smoothq import Recipe, preset
from smoothq.modules import QuantizedLinear, TiedHead
from smoothq.plan.resolve import make_plan
from smoothq.recipe.recipe import Preset, Scope

# Engines by the folder that holds their packages.
RIVALS = {
    "torchao": ("torchao",),
    "quanto": ("quanto",),
    "llamacpp": ("llama.cpp-q8_0", "llama.cpp-q4_0"),
}
Kind = Literal["prefill", "decode"]
ROOM = 1.25  # free memory that all models together must leave, as a multiple of their own
MOST_GRAPHS = 64  # all models share one forward, of which each takes a graph a batch
READ_BYTES = 2**29  # what the bandwidth is measured on: far more than any cache holds
console = Console(width=None if Console().is_terminal else 140, highlight=False)


@dataclass(frozen=True)
class Task:
    """What a step does. tokens: of the prompt, or decoded by all sequences together."""

    kind: Kind
    batch: int
    tokens: int
    context: int = 0
    steps: int = 1

    @property
    def name(self) -> str:
        """As a table's head."""
        return f"prefill {self.tokens}" if self.kind == "prefill" else f"decode, batch {self.batch}"


@dataclass(frozen=True)
class Run:
    """Something to time. reset: goes back to the start, untimed. step: timed `steps` times."""

    reset: Callable[[], None]
    step: Callable[[], object]
    steps: int = 1


def run_of(model: PreTrainedModel, task: Task, static: bool = False) -> Run:
    """A task on a model. static: with a cache of a fixed length, on whatever device.

    Prefill: one prompt into an empty cache, up to the logits of its last token. Decode: tokens one
    after another, each the likeliest, behind a context of zeros: what a cache holds does not change
    the time.
    """
    cache = cache_of(model, task, static or model.device.type == "cuda")
    if task.kind == "prefill":
        prompt = torch.randint(model.config.vocab_size, (1, task.tokens), device=model.device)
        return Run(lambda: rewind(cache, 0), lambda: forward(model, prompt, cache))
    token = torch.zeros(task.batch, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        token.copy_(forward(model, token, cache).argmax(-1))

    return Run(lambda: rewind(cache, task.context), step, task.steps)


def cache_of(model: PreTrainedModel, task: Task, static: bool) -> StaticCache | DynamicCache:
    """A cache that holds the task's context: of a fixed length, or growing."""
    config = model.config
    if static:
        room = task.tokens if task.kind == "prefill" else task.context + task.steps
        return StaticCache(config, max_cache_len=room)
    cache = DynamicCache(config=config)
    size = config.hidden_size // config.num_attention_heads
    held = torch.zeros(
        task.batch, config.num_key_value_heads, task.context, size, dtype=model.dtype
    )
    for layer in range(config.num_hidden_layers):
        cache.update(held.clone(), held.clone(), layer)
    return cache


def rewind(cache: StaticCache | DynamicCache, tokens: int) -> None:
    """Let a cache have seen only so many tokens."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            seen: Any = layer
            seen.cumulative_length.fill_(tokens)
    elif cache.get_seq_length() > tokens:
        cache.crop(tokens - cache.get_seq_length())


def forward(model: PreTrainedModel, tokens: Tensor, cache: StaticCache | DynamicCache) -> Tensor:
    """The logits after the last of some tokens, (batch, 1, vocabulary)."""
    # By position: transformers renamed the cache's argument.
    output = model(tokens, None, None, cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits
    return logits


def seconds_of(run: Run, where: Where) -> float:
    """Seconds of one step of a run, from its start to its end on the device."""
    run.reset()
    where.synchronize()
    start = time.perf_counter()
    for _ in range(run.steps):
        run.step()
    where.synchronize()
    return (time.perf_counter() - start) / run.steps


@dataclass(frozen=True)
class Memory:
    """Bytes.

    model: of all its tensors, packed or made ready to run. working: what a prompt takes on top at
    its peak, cache included; None where the system does not say.
    """

    model: int
    working: int | None

    @property
    def peak(self) -> int | None:
        """The most that a prompt takes in all."""
        return None if self.working is None else self.model + self.working


def memory(model: PreTrainedModel, tokens: int, where: Where) -> Memory:
    """What a model takes, and what a prompt takes on top, whatever else is in memory."""
    prompt = Task("prefill", 1, tokens)
    run_of(model, prompt).step()  # what the first run alone needs: libraries, autotuning
    return Memory(model_bytes(model), working_bytes(run_of(model, prompt).step, where))


def model_bytes(model: nn.Module) -> int:
    """Bytes of every tensor that a model's modules hold, each storage once."""
    storages = {}
    for module in model.modules():
        plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in (*module._parameters.values(), *module._buffers.values(), *plain):
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def working_bytes(step: Callable[[], object], where: Where) -> int | None:
    """How far a call raises the memory in use at its peak."""
    where.synchronize()
    if where.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        where.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None
    before = proc_bytes("self/status", "VmRSS")
    step()
    return max(proc_bytes("self/status", "VmHWM") - before, 0)


def bytes_read(model: PreTrainedModel, context: int) -> int:
    """What one decoded token reads: every weight that it multiplies, and the keys and values."""
    config: Any = model.config
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.bytes_read(tokens=1)
        elif isinstance(module, TiedHead):
            total += module.embedding.codes.nbytes + module.embedding.weight_scale.nbytes
        elif not isinstance(module, nn.Embedding):
            total += sum(tensor.nbytes for tensor in module.parameters(recurse=False))
    size = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * size * context
    return int(total + cached * model.dtype.itemsize)


def bandwidth_of(where: Where, held: Tensor) -> float:
    """Bytes a second at which a device reads memory once."""
    return held.nbytes / seconds_of(Run(lambda: None, held.sum), where)


class Contender:
    """A model in this process, for which tasks are prepared and timed."""

    def __init__(
        self, name: str, model: PreTrainedModel, where: Where, compiled: bool = False
    ) -> None:
        """compiled: `torch.compile` its decode as one graph, over a cache of a fixed length."""
        self.name, self.where, self._model = name, where, model
        self._compiled = compiled
        if compiled:
            torch._dynamo.config.recompile_limit = MOST_GRAPHS
            model.forward = torch.compile(model.forward, fullgraph=True)
        self._runs: dict[Task, Run] = {}

    def seconds(self, task: Task) -> float:
        """Of one step of a task; infinite where it is not tried."""
        if self._compiled and task.kind == "prefill":
            return math.inf
        if task not in self._runs:
            run = run_of(self._model, task, self._compiled)
            if self.where.device.type == "cuda":
                run = Run(run.reset, as_graph(run.step, run.reset), run.steps)
            self._runs = {task: run}
        return seconds_of(self._runs[task], self.where)

    def memory(self, tokens: int) -> Memory | None:
        """What it takes with a prompt of so many tokens."""
        return None if self._compiled else memory(self._model, tokens, self.where)

    def bytes_read(self, context: int) -> int | None:
        """By a decoded token, beside that many tokens before it."""
        return bytes_read(self._model, context)

    def close(self) -> None:
        """Let go of everything."""
        del self._model, self._runs
        gc.collect()
        if self.where.device.type == "cuda":
            torch.cuda.empty_cache()


class Rival(Contender):
    """Another engine, in a process and with packages of its own: see `rivals.py`."""

    def __init__(self, engine: str, directory: str, size: Size) -> None:
        """directory: where `pip install --target` put the engine."""
        self.name = engine
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("rivals.py"), engine, "--size", size],
            env={**os.environ, "PYTHONPATH": directory},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name = self._answer()["name"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped; run scripts/rivals.py by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, task: Task) -> float:
        """Of one step of a task; infinite where the engine cannot do it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(task)) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def memory(self, tokens: int) -> Memory | None:
        """Not known from outside."""
        return None

    def bytes_read(self, context: int) -> int | None:
        """Not known from outside."""
        return None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()


@dataclass
class Measured:
    """What is known of a contender: a spread of seconds a task, memory, bytes read a token."""

    seconds: dict[Task, Spread] = field(default_factory=dict)
    memory: Memory | None = None
    bytes_read: int | None = None

    @property
    def done(self) -> list[Task]:
        """The tasks that it could do."""
        return [task for task, spread in self.seconds.items() if math.isfinite(spread.median)]


@dataclass
class Session:
    """All contenders by name, the tasks, and the memory bandwidth between their turns."""

    tasks: tuple[Task, ...]
    found: dict[str, Measured] = field(default_factory=dict)
    bandwidth: Spread | None = None

    def measure(self, contenders: list[Contender], repetitions: int, where: Where) -> None:
        """Time every task on the contenders in turns; each one's first turn is thrown away."""
        longest = max(task.tokens for task in self.tasks if task.kind == "prefill")
        context = max(task.context for task in self.tasks)
        for one in contenders:
            self.found[one.name] = Measured({}, one.memory(longest), one.bytes_read(context))
        held = torch.ones(READ_BYTES // 8, dtype=torch.long, device=where.device)
        bandwidths = []
        for task in self.tasks:
            turns: dict[str, list[float]] = {one.name: [] for one in contenders}
            for _ in range(repetitions + 1):
                for one in contenders:
                    turns[one.name].append(one.seconds(task))
                bandwidths.append(bandwidth_of(where, held))
            for name, seconds in turns.items():
                self.found[name].seconds[task] = Spread.of(seconds[1:])
        self.bandwidth = Spread.of(bandwidths)

    def bound(self, name: str) -> float | None:
        """Seconds in which a decoded token's bytes can be read at best."""
        read = self.found[name].bytes_read
        return None if read is None or self.bandwidth is None else read / self.bandwidth.median

    def of_bound(self, name: str) -> float | None:
        """The share of a decode step at batch 1 that reading its bytes takes."""
        bound, seconds = self.bound(name), self.found[name].seconds
        one = next((t for t in self.tasks if t.kind == "decode" and t.batch == 1), None)
        return None if bound is None or one is None else bound / seconds[one].median

    def table(self, floats: list[str]) -> Table:
        """Tokens a second, how many times as fast as each float model, and memory."""
        table = Table("tokens/s (times " + ", ".join(floats) + ")")
        for task in self.tasks:
            table.add_column(task.name, justify="right")
        for head in ("of its byte bound", "model, GB", "peak, GB"):
            table.add_column(head, justify="right")
        for name, one in self.found.items():
            cells = [self._cell(one, task, floats) for task in self.tasks]
            share, used = self.of_bound(name), one.memory
            cells.append("" if share is None else f"{share:.0%}")
            sizes = (None, None) if used is None else (used.model, used.peak)
            cells += ["" if size is None else f"{size / 1e9:.2f}" for size in sizes]
            table.add_row(name, *cells)
        return table

    def _cell(self, one: Measured, task: Task, floats: list[str]) -> str:
        if task not in one.done:
            return ""
        median = one.seconds[task].median
        times = [self.found[name].seconds[task].median / median for name in floats]
        return f"{task.tokens / median:.1f} ({', '.join(f'{ratio:.2f}' for ratio in times)})"

    def rows(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bandwidth": None if self.bandwidth is None else asdict(self.bandwidth),
            "tasks": [{"name": task.name, **asdict(task)} for task in self.tasks],
            "contenders": {
                name: {
                    "seconds": {task.name: asdict(one.seconds[task]) for task in one.done},
                    "tokens_a_second": {
                        task.name: task.tokens / one.seconds[task].median for task in one.done
                    },
                    "memory": one.memory and {**asdict(one.memory), "peak": one.memory.peak},
                    "bytes_read": one.bytes_read,
                    "of_byte_bound": self.of_bound(name),
                }
                for name, one in self.found.items()
            },
        }


Builder = Callable[[], Contender]


def measured_in_turns(
    builders: list[Builder],
    tasks: tuple[Task, ...],
    repetitions: int,
    where: Where,
    together: bool,
) -> Session:
    """All at once if memory holds them together, else one after the other."""
    session = Session(tasks)
    if together:
        # Other engines last in the table and first in memory, which they fill before they shrink.
        contenders = [build() for build in reversed(builders)][::-1]
        session.measure(contenders, repetitions, where)
        for one in contenders:
            one.close()
        return session
    for build in builders:
        one = build()
        session.measure([one], repetitions, where)
        one.close()
    return session


def needed_bytes(config: PretrainedConfig, floats: list[Where], recipes: list[Recipe]) -> int:
    """What all models take together: their shapes are known before any is made."""
    total = 0
    for where in floats:
        empty = skeleton(config, where.dtype)
        total += sum(parameter.nbytes for parameter in empty.parameters())
    for recipe in recipes:
        empty = skeleton(config, floats[0].dtype)
        plan = make_plan(empty, recipe)
        elements = sum(parameter.numel() for parameter in empty.parameters())
        unpacked = elements - plan.float_elements  # a byte each, where codes do not run packed
        total += plan.float_elements * floats[0].dtype.itemsize + plan.linear_bytes + unpacked
    return total


def recipe_of(name: str) -> Recipe:
    """A preset's recipe; w8a4-token and w8a4-calibrated: runtime smoothing before int8 weights."""
    if name.startswith("w8a4-"):
        return preset("w4a4", "rs", cast(Scope, name.removeprefix("w8a4-"))).edit(weights__bits=8)
    return preset(cast(Preset, name))


def circumstances(where: Where) -> dict[str, Any]:
    """What ran, where, and on which versions, as JSON."""
    on_gpu = where.device.type == "cuda"
    return {
        "command": f"python scripts/{Path(__file__).name} {shlex.join(sys.argv[1:])}".strip(),
        "device": where.name,
        "threads": None if on_gpu else torch.get_num_threads(),
        "cuda_graphs": on_gpu,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if on_gpu else None,
        "transformers": transformers.__version__,
    }


@torch.no_grad()
def main(
    presets: Annotated[
        list[str] | None, typer.Option("--preset", help="A recipe; may be repeated.")
    ] = None,
    size: Annotated[
        Size | None, typer.Option(help="Of the model: 8b on a GPU without it, 135m on a CPU.")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prefill, 512 and 2048; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences of a decode, 1 and 8; may be repeated.")
    ] = None,
    head_8: Annotated[
        bool, typer.Option("--head-8", help="Embedding and head of quantized models in 8 bits.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="The first preset also under torch.compile.")
    ] = False,
    rivals: Annotated[
        Path | None, typer.Option(help="Folder with other engines' packages, one folder each.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens before the decoded ones.", min=0)] = 512,
    steps: Annotated[int, typer.Option(help="Tokens decoded a repetition.", min=1)] = 16,
    repetitions: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 10,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; on a GPU benchmarks/<GPU>-model-<size>.json."),
    ] = None,
) -> None:
    """Build the models, measure, print a table, and write JSON."""
    torch.manual_seed(0)
    where = Where.here()
    on_gpu = where.device.type == "cuda"
    size = size or ("8b" if on_gpu else "135m")
    config = config_of(size)
    floats = [where] if on_gpu else [where, Where(where.device, torch.bfloat16)]
    recipes = {name: recipe_of(name) for name in presets or ["w4a8"]}
    if head_8:
        recipes = {
            f"{name}, head 8 bits": recipe.model_copy(update={"embeddings": 8})
            for name, recipe in recipes.items()
        }
    builders: list[Builder] = []

    def in_float(one: Where) -> Contender:
        return Contender(one.dtype_name, random_float_model(config, one), where)

    def quantized(name: str, recipe: Recipe, whole: bool) -> Contender:
        model = random_quantized_model(config, recipe, where)
        return Contender(f"{name}, compiled" if whole else name, model, where, whole)

    builders += [partial(in_float, one) for one in floats]
    for name, recipe in recipes.items():
        both = (False, True)[: 1 + (compiled and name == next(iter(recipes)))]
        builders += [partial(quantized, name, recipe, whole) for whole in both]
    if rivals is not None:
        for folder in (rivals / name for name in RIVALS if (rivals / name).is_dir()):
            builders += [
                partial(Rival, engine, str(folder), size) for engine in RIVALS[folder.name]
            ]
    prompts, batches = tuple(prompt or (512, 2048)), tuple(batch or (1, 8))
    tasks = tuple(Task("prefill", 1, tokens) for tokens in prompts)
    tasks += tuple(Task("decode", many, many, context, steps) for many in batches)
    needed = needed_bytes(config, floats, list(recipes.values()))
    together = where.free_memory() > ROOM * needed
    session = measured_in_turns(builders, tasks, repetitions, where, together)
    console.print(f"{where.name}, torch {torch.__version__}; {size}, random weights")
    if not together:
        console.print("memory does not hold all models: measured one after the other")
    console.print(session.table([one.dtype_name for one in floats]))
    if output is None and on_gpu:
        output = Path("benchmarks") / f"{slug(where.name)}-model-{slug(size)}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        results = {**circumstances(where), "size": size, "alternated": together}
        output.write_text(json.dumps(results | session.rows(), indent=1) + "\n")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
