"""Prefill, decode and memory of a whole model, quantized beside float, both with random weights.

    python scripts/bench_model.py --preset w4a8                    # on a GPU: Llama-3-8B's shape
    python scripts/bench_model.py --preset w8a8 --size 135m        # on a CPU

Speed does not depend on what weights say, so that no checkpoint is needed: the quantized model has
the modules that the preset's plan installs, filled with random codes. Both sides use a static
cache; on a GPU each forward is one CUDA graph against bfloat16, on a CPU it runs eagerly against
float32. The sides take turns, unless memory holds only one of them at a time.
"""

from __future__ import annotations

import gc
import importlib
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from timing import Spread, as_graph, slug
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from smoothq import Recipe, preset
from smoothq.integrations.transformers import prepare
from smoothq.kernels import largest_multiplier
from smoothq.modules import InputQuantizer, QuantizedLinear
from smoothq.plan import Plan, install, make_plan
from smoothq.recipe import Preset
from smoothq.rounding.grid import QuantizedWeight, Scales

Size = Literal["tiny", "135m", "1.1b", "8b"]
Side = Literal["float", "quantized"]
SIDES: tuple[Side, ...] = get_args(Side)
ROOM = 1.25  # free memory that both models together must leave, as a multiple of their own
console = Console(width=None if Console().is_terminal else 120, highlight=False)


def config_of(size: Size) -> LlamaConfig:
    """The shapes of a tiny model, SmolLM2-135M, TinyLlama-1.1B and Llama-3-8B."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
    )
    values: dict[Size, tuple[int, ...]] = {
        "tiny": (256, 128, 384, 2, 4, 2, True),
        "135m": (49152, 576, 1536, 30, 9, 3, True),
        "1.1b": (32000, 2048, 5632, 22, 32, 4, False),
        "8b": (128256, 4096, 14336, 32, 32, 8, False),
    }
    return LlamaConfig(**dict(zip(names, values[size], strict=True)), max_position_embeddings=8192)


@dataclass(frozen=True)
class Where:
    """The device, and the dtype of all that is not quantized there."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def here(cls) -> Where:
        """A GPU in bfloat16 if there is one, else the CPU in float32."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.bfloat16)
        return cls(torch.device("cpu"), torch.float32)

    @property
    def name(self) -> str:
        """What the device is called."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        found = proc_field("cpuinfo", "model name") or platform.machine()
        return f"{found}, {torch.backends.cpu.get_cpu_capability()}"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes that can still be taken; 0 where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0]
        return proc_bytes("meminfo", "MemAvailable")


def proc_field(file: str, name: str) -> str | None:
    """A field of one of Linux's /proc files; None elsewhere."""
    path = Path("/proc") / file
    text = path.read_text() if path.is_file() else ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else None


def proc_bytes(file: str, name: str) -> int:
    """A field that counts kilobytes, in bytes; 0 if there is none."""
    return int((proc_field(file, name) or "0").split()[0]) * 1024


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def fill_floats(model: PreTrainedModel, where: Where) -> None:
    """Give every parameter that is still on the meta device random values, and the rest a home."""
    for module in list(model.modules()):
        for name, like in list(module.named_parameters(recurse=False)):
            values = torch.ones(like.shape, dtype=where.dtype, device=where.device)
            if like.dim() > 1:
                values.normal_(std=like.shape[-1] ** -0.5)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    # Its frequencies are no parameters: they are reckoned when it is made.
    rotary = model.get_submodule("model.rotary_emb")
    model.set_submodule("model.rotary_emb", type(rotary)(model.config).to(where.device))


def random_weight(layer: QuantizedLinear, device: torch.device) -> QuantizedWeight:
    """Codes and scales that the layer's grid allows, of about the size of a trained weight's."""
    grid, stored = layer.spec.grid, layer.spec.tensors()
    shape, multiplier = (layer.out_features, layer.in_features), None
    codes = torch.randint(grid.lowest, grid.highest + 1, shape, dtype=torch.int8, device=device)
    step = layer.in_features**-0.5 / grid.highest
    if "weight_multiplier" in stored:
        largest, size = largest_multiplier(grid.bits), stored["weight_multiplier"].shape
        multiplier = torch.randint(1, largest + 1, size, dtype=torch.int8, device=device)
        step /= largest
    scale = step * (0.5 + torch.rand(stored["weight_scale"].shape, device=device))
    return QuantizedWeight(codes, Scales(scale.to(stored["weight_scale"].dtype), multiplier))


def random_float_model(config: PretrainedConfig, where: Where) -> PreTrainedModel:
    """A float model with random weights."""
    model = skeleton(config, where.dtype)
    fill_floats(model, where)
    return model


def random_quantized_model(
    config: PretrainedConfig, recipe: Recipe, where: Where
) -> PreTrainedModel:
    """A model with the modules that a recipe asks for, filled with random codes and scales."""
    model = skeleton(config, where.dtype)
    install(model, make_plan(model, recipe))
    fill_floats(model, where)
    for module in model.modules():
        if isinstance(module, InputQuantizer):
            module.to(where.device)
        elif isinstance(module, QuantizedLinear):
            bias = None
            if module.bias is not None:
                bias = torch.zeros(module.bias.shape, dtype=where.dtype, device=where.device)
            module.set_weight(random_weight(module, where.device), bias)
    prepare(model)
    return model


@dataclass(frozen=True)
class Run:
    """Something to time. reset: goes back to the start, untimed. step: timed `steps` times."""

    reset: Callable[[], None]
    step: Callable[[], object]
    steps: int = 1


def prefill(model: PreTrainedModel, tokens: int) -> Run:
    """One prompt into an empty static cache, up to the logits of its last token."""
    cache = StaticCache(model.config, max_cache_len=tokens)
    prompt = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    return Run(lambda: rewind(cache, 0), lambda: forward(model, prompt, cache))


def decode(model: PreTrainedModel, batch: int, context: int, steps: int) -> Run:
    """Tokens one after another, each the likeliest, behind `context` tokens in a static cache.

    The cache holds zeros there: what it holds does not change the time.
    """
    cache = StaticCache(model.config, max_cache_len=context + steps)
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        token.copy_(forward(model, token, cache).argmax(-1))

    return Run(lambda: rewind(cache, context), step, steps)


def forward(model: PreTrainedModel, tokens: Tensor, cache: StaticCache) -> Tensor:
    """The logits after the last of some tokens, (batch, 1, vocabulary)."""
    # By position: transformers renamed the cache's argument.
    output = model(tokens, None, None, cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits
    return logits


def rewind(cache: StaticCache, tokens: int) -> None:
    """Let a cache have seen only so many tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def alternate(runs: dict[Side, Run], repetitions: int, where: Where) -> dict[Side, Spread]:
    """Time runs in turns; the first round is thrown away."""
    if where.device.type == "cuda":
        runs = {
            side: Run(run.reset, as_graph(run.step, run.reset), run.steps)
            for side, run in runs.items()
        }
    seconds: dict[Side, list[float]] = {side: [] for side in runs}
    for _ in range(repetitions + 1):
        for side, run in runs.items():
            seconds[side].append(seconds_of(run, where))
    return {side: Spread.of(values[1:]) for side, values in seconds.items()}


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
    """Bytes. model: of all its tensors, packed or made ready to run. working: what a prompt takes
    on top at its peak, cache included; None where the system does not say."""

    model: int
    working: int | None

    @property
    def peak(self) -> int | None:
        """The most that a prompt takes in all."""
        return None if self.working is None else self.model + self.working


def memory(model: PreTrainedModel, tokens: int, where: Where) -> Memory:
    """What a model takes, and what a prompt takes on top, whatever else is in memory."""
    prefill(model, tokens).step()  # what the first run alone needs: libraries, autotuning
    return Memory(model_bytes(model), working_bytes(prefill(model, tokens).step, where))


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


@dataclass(frozen=True)
class Asked:
    """What is measured: prompts, batches, the context and number of decoded tokens."""

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    steps: int
    repetitions: int


@dataclass(frozen=True)
class Speed:
    """One task's times. tokens: how many a step handles."""

    task: Literal["prefill", "decode"]
    batch: int
    tokens: int
    seconds: dict[Side, Spread]

    def row(self) -> dict[str, Any]:
        """As JSON: seconds and tokens a second, and how much faster the quantized side is."""
        a_second = {side: self.tokens / spread.median for side, spread in self.seconds.items()}
        return {
            **asdict(self),
            "tokens_a_second": a_second,
            "speedup": a_second["quantized"] / a_second["float"],
        }


def measure(
    models: dict[Side, PreTrainedModel], asked: Asked, where: Where
) -> tuple[list[Speed], dict[Side, Memory]]:
    """All tasks on the models at hand, in turns."""
    longest = max(asked.prompts)
    used = {side: memory(model, longest, where) for side, model in models.items()}
    speeds = []

    for tokens in asked.prompts:
        runs = {side: prefill(model, tokens) for side, model in models.items()}
        speeds.append(Speed("prefill", 1, tokens, alternate(runs, asked.repetitions, where)))
    for batch in asked.batches:
        settings = (batch, asked.context, asked.steps)
        runs = {side: decode(model, *settings) for side, model in models.items()}
        speeds.append(Speed("decode", batch, batch, alternate(runs, asked.repetitions, where)))
    return speeds, used


def measure_in_turns(
    builders: dict[Side, Callable[[], PreTrainedModel]], asked: Asked, where: Where, together: bool
) -> tuple[list[Speed], dict[Side, Memory]]:
    """Both sides at once if memory holds them together, else one side after the other."""
    if together:
        return measure({side: build() for side, build in builders.items()}, asked, where)
    speeds: list[Speed] = []
    used: dict[Side, Memory] = {}
    for side, build in builders.items():
        found, its_memory = measure({side: build()}, asked, where)
        used |= its_memory
        speeds = (
            found if not speeds else [merged(*pair) for pair in zip(speeds, found, strict=True)]
        )
        gc.collect()
        if where.device.type == "cuda":
            torch.cuda.empty_cache()
    return speeds, used


def merged(first: Speed, second: Speed) -> Speed:
    """The same task, measured on two sides apart."""
    return Speed(first.task, first.batch, first.tokens, {**first.seconds, **second.seconds})


def fit_together(model: PreTrainedModel, plan: Plan, where: Where) -> bool:
    """Whether memory holds a float and a quantized model: its shapes are known before either is."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    unpacked = elements - plan.float_elements  # a byte each, where codes do not run packed
    floats = (elements + plan.float_elements) * where.dtype.itemsize
    return where.free_memory() > ROOM * (floats + plan.linear_bytes + unpacked)


def table_of(speeds: Iterable[Speed], used: dict[Side, Memory], names: dict[Side, str]) -> Table:
    """Tokens a second and gigabytes of both sides."""
    table = Table("", *names.values(), f"{names['quantized']} / {names['float']}")
    for speed in speeds:
        what = f"{speed.tokens} tokens" if speed.task == "prefill" else f"batch {speed.batch}"
        cells = [rate(speed, side) for side in SIDES]
        table.add_row(f"{speed.task}, {what}: tokens/s", *cells, f"{speed.row()['speedup']:.2f}")
    for what, values in (
        ("model", [used[side].model for side in SIDES]),
        ("peak of the longest prompt", [used[side].peak for side in SIDES]),
    ):
        full, small = values
        if full is not None and small is not None:
            cells = [f"{full / 1e9:.3f}", f"{small / 1e9:.3f}"]
            table.add_row(f"memory, {what}: GB", *cells, f"{small / full:.2f}")
    return table


def rate(speed: Speed, side: Side) -> str:
    """Tokens a second: the median, and what lies between the slow and the fast repetitions."""
    spread = speed.seconds[side]
    median, slow, fast = (speed.tokens / s for s in (spread.median, spread.p80, spread.p20))
    return f"{median:.1f} ({slow:.1f} to {fast:.1f})"


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


def figures(speeds: list[Speed], used: dict[Side, Memory]) -> dict[str, Any]:
    """What was measured, as JSON."""
    return {
        "prefill": [speed.row() for speed in speeds if speed.task == "prefill"],
        "decode": [speed.row() for speed in speeds if speed.task == "decode"],
        "memory": {side: {**asdict(used[side]), "peak": used[side].peak} for side in SIDES},
    }


@torch.no_grad()
def main(
    quantization: Annotated[Preset, typer.Option("--preset", help="The recipe.")] = "w4a8",
    size: Annotated[
        Size | None, typer.Option(help="Of the model: 8b on a GPU without it, 135m on a CPU.")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prefill, 512 and 2048; may be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences of a decode, 1 and 8; may be repeated.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens before the decoded ones.", min=0)] = 512,
    steps: Annotated[int, typer.Option(help="Tokens decoded a repetition.", min=1)] = 32,
    repetitions: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 10,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; on a GPU benchmarks/<GPU>-model-<size>-<preset>.json."),
    ] = None,
) -> None:
    """Build both models, measure, print a table, and write JSON."""
    torch.manual_seed(0)
    where = Where.here()
    on_gpu = where.device.type == "cuda"
    size = size or ("8b" if on_gpu else "135m")
    asked = Asked(tuple(prompt or (512, 2048)), tuple(batch or (1, 8)), context, steps, repetitions)
    config, recipe = config_of(size), preset(quantization)
    empty = skeleton(config, where.dtype)
    together = fit_together(empty, make_plan(empty, recipe), where)
    builders: dict[Side, Callable[[], PreTrainedModel]] = {
        "float": lambda: random_float_model(config, where),
        "quantized": lambda: random_quantized_model(config, recipe, where),
    }
    speeds, used = measure_in_turns(builders, asked, where, together)
    names: dict[Side, str] = {
        "float": str(where.dtype).removeprefix("torch."),
        "quantized": quantization,
    }
    console.print(f"{where.name}, torch {torch.__version__}; {size}, random weights")
    if not together:
        console.print("memory does not hold both models: measured one after the other")
    console.print(table_of(speeds, used, names))
    if output is None and on_gpu:
        output = Path("benchmarks") / f"{slug(where.name)}-model-{slug(size)}-{quantization}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        what = {"size": size, "preset": quantization, "float_dtype": names["float"]}
        results = {**circumstances(where), **what, "alternated": together, "asked": asdict(asked)}
        output.write_text(json.dumps(results | figures(speeds, used), indent=1) + "\n")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
