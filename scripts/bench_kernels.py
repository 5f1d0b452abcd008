"""Time every Triton operator on the shapes of real models, beside what else a GPU could run there.

    python scripts/bench_kernels.py
    TRITON_INTERPRET=1 python scripts/bench_kernels.py --toy    # without a GPU: does it run at all?

The products meet cuBLAS in bfloat16, `torch._int_mm` (whose time holds no scaling), torchao and
gemlite where they are installed; the quantizers meet a copy of as many bytes; runtime smoothing
meets a plain per-token quantizer before the same product. Competitors take turns (A, B, C, A, B,
C, …), each alone in a CUDA graph, so that no launch is timed, and after a write over the whole L2
cache. Medians with their 20th and 80th percentiles are reported, and set against ceilings that the
same run measured: the best large product, the best large copy.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from timing import Spread, as_graph, slug
from torch import Tensor

from smoothq.kernels import QuantizedInput, largest_multiplier
from smoothq.kernels import triton as operators
from smoothq.kernels.triton import launch
from smoothq.modules import OnlineRotation
from smoothq.rounding.packing import pack
from smoothq.transforms.hadamard import Hadamard

BITS = 4  # of the quantizers' codes; weights and codes of the products are 4 or 8 by operator
WEIGHT_GROUP = 128  # columns that share a weight's multiplier or scale, or a live block
EXPERTS = 4  # that share the tokens, each with a weight of its own
SMOOTHING_GROUP = 16  # channels that share a token's multiplier: the preset's
WIDE = 4096  # rows from which a projection counts for the targets
INT_MM_TOKENS = 17  # the fewest that torch._int_mm takes
NO_MEASUREMENT = "toy sizes under Triton's interpreter: no measurement"
OTHERS = {
    "torchao int8 dynamic": "torchao",
    "torchao int8 weight-only": "torchao",
    "gemlite A16W4, groups": "gemlite",
}
BASELINES = {"product": "bf16", "quantizer": "copy", "smoothing": "quantize_per_token + int8_gemm"}

Part = Literal["product", "quantizer", "smoothing"]
Unit = Literal["int8", "bf16"]
Run = Callable[[], object]
console = Console(width=None if Console().is_terminal else 120, highlight=False)


@dataclass(frozen=True)
class Shape:
    """The weight of one or more projections of a model: (rows, width). Equal ones run once."""

    model: str
    projections: tuple[str, ...]
    rows: int
    width: int


def projections(model: str, hidden: int, intermediate: int, kv: int) -> tuple[Shape, ...]:
    """The weights of a model's block; v is as k, and up as gate."""
    return (
        Shape(model, ("q", "o"), hidden, hidden),
        Shape(model, ("k",), kv, hidden),
        Shape(model, ("gate",), intermediate, hidden),
        Shape(model, ("down",), hidden, intermediate),
    )


@dataclass(frozen=True)
class Sizes:
    """What is run: weights, numbers of tokens, and the sizes of the ceilings' product and copy."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    square: int
    copied: int
    repetitions: int


REAL = Sizes(
    projections("Llama-3-8B", 4096, 14336, 1024) + projections("Qwen2.5-7B", 3584, 18944, 512),
    (1, 16, 128, 2048, 8192),
    square=8192,
    copied=2**30,
    repetitions=50,
)
TOY = Sizes(projections("toy", 128, 256, 128), (1, 17), square=64, copied=2**16, repetitions=1)


class Timer(Protocol):
    """Times runs against one another."""

    device: torch.device

    def prepared(self, run: Run) -> Run:
        """The run, warm and ready to be timed."""

    def alternate(self, runs: list[Run], repetitions: int) -> list[Spread]:
        """Time prepared runs in turns."""


class GpuTimer:
    """CUDA events around CUDA graphs, with a cold L2 cache."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flush = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=self.device)

    def prepared(self, run: Run) -> Run:
        """The run as a graph, tuned and compiled."""
        return as_graph(run)

    def alternate(self, runs: list[Run], repetitions: int) -> list[Spread]:
        """Time prepared runs in turns; the first round is thrown away."""
        marks = [[self._timed(run) for run in runs] for _ in range(repetitions + 1)]
        torch.cuda.synchronize()
        seconds = [[start.elapsed_time(end) / 1e3 for start, end in turn] for turn in marks[1:]]
        return [Spread.of(list(of_one)) for of_one in zip(*seconds, strict=True)]

    def _timed(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        return start, end


class CpuTimer:
    """The clock on the wall, for toy sizes."""

    device = torch.device("cpu")

    def prepared(self, run: Run) -> Run:
        """The run itself."""
        return run

    def alternate(self, runs: list[Run], repetitions: int) -> list[Spread]:
        """Time runs in turns."""
        seconds = [[self._timed(run) for run in runs] for _ in range(repetitions)]
        return [Spread.of(list(of_one)) for of_one in zip(*seconds, strict=True)]

    def _timed(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Contender:
    """One way to compute something.

    bytes: read and written at the least, if every tensor is touched once. operations: of the
    product, on `unit`; the quantizers' own are not counted. foreign: another project's code, whose
    failure is reported and does not end the run.
    """

    name: str
    run: Run
    bytes: int
    operations: int = 0
    unit: Unit = "int8"
    foreign: bool = False


@dataclass(frozen=True)
class Ceilings:
    """What the device does at its best: operations a second by unit, and bytes a second.

    floor: seconds of a kernel that does nothing, the least that can be timed.
    """

    int8: float
    bf16: float
    bandwidth: float
    floor: float

    def seconds(self, contender: Contender) -> float:
        """The least time that the contender's operations and bytes leave room for."""
        peak = self.int8 if contender.unit == "int8" else self.bf16
        return max(contender.operations / peak, contender.bytes / self.bandwidth)


@dataclass(frozen=True)
class Row:
    """One measured operator, or why it is not measured.

    relative: its median time over that of the part's baseline. of_ceiling: the least time that the
    ceilings leave room for, over the median. rows: 0 for a quantizer, which has no weight.
    """

    part: Part
    model: str
    projections: tuple[str, ...]
    tokens: int
    rows: int
    width: int
    operator: str
    status: str = "measured"
    seconds: Spread | None = None
    operations: int = 0
    bytes: int = 0
    relative: float | None = None
    of_ceiling: float | None = None


@dataclass
class Results:
    """Everything that goes into the JSON file. complete: whether the run came to its end."""

    command: str
    interpreted: bool
    device: str
    torch: str
    triton: str
    others: dict[str, str]
    repetitions: int
    notes: tuple[str, ...]
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def save(self, path: Path | None) -> None:
        """Write what there is so far: a run that is cut off leaves its rows."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")


class Operands:
    """Random tensors of one shape and number of tokens, in every form that an operator takes."""

    def __init__(self, tokens: int, rows: int, width: int, device: torch.device) -> None:
        def integers(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high + 1, size, dtype=torch.int8, device=device)

        def scales(*size: int) -> Tensor:
            return torch.rand(size, device=device) / width

        self.tokens, self.rows, self.width = tokens, rows, width
        groups = width // WEIGHT_GROUP
        self.x = torch.randn(tokens, width, device=device).bfloat16()
        self.weight = torch.randn(rows, width, device=device).bfloat16()
        self.codes, self.scale = integers(-127, 127, tokens, width), scales(tokens, 1)
        self.weight8, self.row_scale = integers(-127, 127, rows, width), scales(rows)
        self.codes4 = integers(-7, 7, rows, width)
        self.packed = pack(self.codes4, 4)
        self.multiplier = integers(1, largest_multiplier(4), rows, groups)
        self.group_scale = scales(rows, groups).bfloat16()
        self.experts = [self.packed.clone() for _ in range(EXPERTS)]
        shares = torch.arange(1, EXPERTS + 1, device=device) * tokens
        self.ends = (shares + EXPERTS - 1) // EXPERTS
        self.block_scale = scales(1, groups)
        self.e8m0 = integers(100, 127, rows, width // 32).view(torch.uint8)
        self.e4m3 = integers(1, 126, rows, width // 16).view(torch.uint8)
        self.tensor_scale = scales(1)
        self.words = {
            bits: torch.randint(2**31, (rows, width * bits // 32), dtype=torch.int32, device=device)
            for bits in (2, 3)
        }
        self.order = torch.randperm(width, device=device)[None]
        self.smoothing = integers(1, largest_multiplier(BITS), width)
        self.out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="meta")

    @property
    def operations(self) -> int:
        """Of the product: a multiplication and an addition count as two."""
        return 2 * self.tokens * self.rows * self.width

    def moved(self, *read: Tensor) -> int:
        """Bytes of what a product reads and of its result."""
        return sum(tensor.nbytes for tensor in (*read, self.out))

    def product(self, name: str, run: Run, *read: Tensor, unit: Unit = "int8") -> Contender:
        """A contender that computes the product from some of the tensors."""
        return Contender(name, run, self.moved(*read), self.operations, unit)


def products(o: Operands) -> Iterator[Contender]:
    """Our products, and those of PyTorch, on the same operands; the baseline first."""
    codes, scale, dtype = o.codes, o.scale, torch.bfloat16
    yield o.product("bf16", lambda: o.x @ o.weight.t(), o.x, o.weight, unit="bf16")
    if o.tokens >= INT_MM_TOKENS:
        yield o.product(
            "torch._int_mm", lambda: torch._int_mm(codes, o.weight8.t()), codes, o.weight8
        )
    yield o.product(
        "int8_gemm",
        lambda: operators.int8_gemm(codes, scale, o.weight8, o.row_scale, None, dtype),
        *(codes, scale, o.weight8, o.row_scale),
    )
    yield o.product(
        "int4_gemm",
        lambda: operators.int4_gemm(codes, scale, o.packed, o.row_scale, None, None, dtype),
        *(codes, scale, o.packed, o.row_scale),
    )
    yield o.product(
        "int4_gemm, multipliers",
        lambda: operators.int4_gemm(codes, scale, o.packed, o.row_scale, o.multiplier, None, dtype),
        *(codes, scale, o.packed, o.row_scale, o.multiplier),
    )
    yield o.product(
        "group_gemm, live",
        lambda: operators.group_gemm(
            codes[None],
            scale[None],
            o.block_scale,
            o.order,
            o.weight8,
            o.row_scale[:, None],
            None,
            WEIGHT_GROUP,
            dtype,
        ),
        *(codes, scale, o.block_scale, o.order, o.weight8, o.row_scale),
    )
    for name, step in (("row", o.row_scale[:, None]), ("groups", o.group_scale)):
        yield o.product(
            f"weight_only_gemm, {name}",
            partial(operators.weight_only_gemm, o.x, o.packed, step, None, None, 4),
            *(o.x, o.packed, step),
            unit="bf16",
        )
    for name, element, steps, tensor_scale in (
        ("E4M3, rows", "e4m3", o.row_scale[:, None], None),
        ("MXFP4", "e2m1", o.e8m0, None),
        ("NVFP4", "e2m1", o.e4m3, o.tensor_scale),
    ):
        weight = o.packed if element == "e2m1" else o.weight8.view(torch.uint8)
        yield o.product(
            f"fp_gemm, {name}",
            partial(operators.fp_gemm, o.x, weight, steps, tensor_scale, None, element),
            *(o.x, weight, steps),
            unit="bf16",
        )
    for bits, words in o.words.items():
        yield o.product(
            f"weight_only_gemm, {bits} bits, groups",
            partial(operators.weight_only_gemm, o.x, words, o.group_scale, None, None, bits),
            *(o.x, words, o.group_scale),
            unit="bf16",
        )
    yield from products_of_experts(o)


def products_of_experts(o: Operands) -> Iterator[Contender]:
    """Our products of tokens that experts share, as much work as those of one weight."""
    used = o.experts[: min(o.tokens, EXPERTS)]  # the others' shares are empty
    row_scales, multipliers = [o.row_scale] * EXPERTS, [o.multiplier] * EXPERTS
    scales, dtype = [o.group_scale] * EXPERTS, torch.bfloat16
    yield o.product(
        "expert_gemm, multipliers",
        lambda: operators.expert_gemm(
            o.codes, o.scale, o.ends, o.experts, row_scales, multipliers, [], dtype
        ),
        *(o.codes, o.scale, *used, *(o.row_scale for _ in used), *(o.multiplier for _ in used)),
    )
    yield o.product(
        "expert_weight_only_gemm, groups",
        lambda: operators.expert_weight_only_gemm(o.x, o.ends, o.experts, scales, [], [], 4),
        *(o.x, *used, *(o.group_scale for _ in used)),
        unit="bf16",
    )


def torchao(o: Operands) -> Iterator[Contender]:
    """torchao's int8 linears, compiled, as its documentation has them run."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    torch.compiler.reset()  # each shape is one more compilation of the same code: they are counted
    kinds: dict[str, tuple[Any, Unit]] = {
        "dynamic": (Int8DynamicActivationInt8WeightConfig(), "int8"),
        "weight-only": (Int8WeightOnlyConfig(), "bf16"),
    }
    for kind, (config, unit) in kinds.items():
        linear = torch.nn.Linear(o.width, o.rows, bias=False, device="meta", dtype=torch.bfloat16)
        linear.weight = torch.nn.Parameter(o.weight, requires_grad=False)
        layer = torch.nn.Sequential(linear)
        quantize_(layer, config)
        compiled = torch.compile(layer, dynamic=False)
        yield o.product(
            f"torchao int8 {kind}",
            partial(compiled, o.x),
            *(o.x, o.weight8, o.row_scale),
            unit=unit,
        )


def gemlite(o: Operands) -> Iterator[Contender]:
    """gemlite's 4-bit weights in groups, under bfloat16 activations."""
    from gemlite import DType, GemLiteLinear

    layer = GemLiteLinear(
        4,
        group_size=WEIGHT_GROUP,
        in_features=o.width,
        out_features=o.rows,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    zeros = torch.full_like(o.group_scale, 8)
    layer.pack((o.codes4 + 8).to(torch.uint8), o.group_scale.clone(), zeros, None)
    yield o.product(
        "gemlite A16W4, groups",
        lambda: layer(o.x),
        *(o.x, o.packed, o.group_scale, zeros),
        unit="bf16",
    )


def foreign(o: Operands, others: dict[str, str]) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of other projects, and why those that are missing are."""
    found: list[Contender] = []
    for package, build in {"torchao": torchao, "gemlite": gemlite}.items():
        if others[package][0].isdigit():  # a version, not a reason why there is none
            try:
                found += build(o)
            except Exception as error:  # another project's code: whatever it raises
                others = {**others, package: f"failed: {type(error).__name__}"}
    names = [contender.name for contender in found]
    absent = {name: others[package] for name, package in OTHERS.items() if name not in names}
    return [replace(contender, foreign=True) for contender in found], absent


def quantizers(tokens: int, width: int, device: torch.device) -> Iterator[Contender]:
    """Every quantizer of one input, and a copy that reads and writes as many bytes."""
    x = torch.randn(1, tokens, width, device=device).bfloat16()
    smoothing = torch.randint(1, largest_multiplier(BITS) + 1, (width,), device=device)
    multiplier = smoothing.to(torch.int8)
    rotation = OnlineRotation(Hadamard.of(width, seed=0))
    rotation.prepare(device)  # as a model does: the factors that run fastest there
    factors = (rotation.signs, rotation.left, rotation.right)
    source = torch.zeros(3 * x.numel() // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "quantize_per_token": lambda: operators.quantize_per_token(x, BITS),
        "quantize_token_groups": lambda: operators.quantize_token_groups(x, BITS, SMOOTHING_GROUP),
        "quantize_smoothed": lambda: operators.quantize_smoothed(x, multiplier, BITS),
        "hadamard_quantize": lambda: operators.hadamard_quantize(x, *factors, BITS),
        "hadamard_quantize, groups": lambda: operators.hadamard_quantize(
            x, *factors, BITS, SMOOTHING_GROUP
        ),
        "fp_quantize, E4M3": lambda: operators.fp_quantize(x, "e4m3", "token"),
        "fp_quantize, MXFP4": lambda: operators.fp_quantize(x, "e2m1", "e8m0", 32),
        "runtime_smooth_quantize, live": lambda: operators.runtime_smooth_quantize(
            x, BITS, WEIGHT_GROUP
        ),
    }
    for name, run in runs.items():
        yield Contender(name, run, 2 * source.nbytes)


def smoothing(o: Operands) -> Iterator[Contender]:
    """int8_gemm after each quantizer that it can follow: what runtime smoothing adds."""
    quantizers: dict[str, Callable[[], QuantizedInput]] = {
        "quantize_per_token": lambda: operators.quantize_per_token(o.x, BITS),
        "quantize_token_groups": lambda: operators.quantize_token_groups(
            o.x, BITS, SMOOTHING_GROUP
        ),
        "quantize_smoothed": lambda: operators.quantize_smoothed(o.x, o.smoothing, BITS),
    }
    for name, quantize in quantizers.items():

        def run(quantize: Callable[[], QuantizedInput] = quantize) -> Tensor:
            codes, scale = quantize()[:2]
            found: Tensor = operators.int8_gemm(
                codes, scale, o.weight8, o.row_scale, None, torch.bfloat16
            )
            return found

        yield o.product(f"{name} + int8_gemm", run, o.x, o.codes, o.weight8, o.row_scale)


def timed(
    timer: Timer, contenders: Iterable[Contender], repetitions: int
) -> tuple[list[tuple[Contender, Spread]], dict[str, str]]:
    """Every contender with its time, and the foreign ones that failed with the reason."""
    ready: list[tuple[Contender, Run]] = []
    failed: dict[str, str] = {}
    for contender in contenders:
        try:
            ready.append((contender, timer.prepared(contender.run)))
        except Exception as error:
            if not contender.foreign:
                raise
            failed[contender.name] = f"failed: {type(error).__name__}"
    spreads = timer.alternate([run for _, run in ready], repetitions)
    return [(c, spread) for (c, _), spread in zip(ready, spreads, strict=True)], failed


def measure_ceilings(timer: Timer, sizes: Sizes) -> Ceilings:
    """A large square product in each unit, and a large copy, each at its best."""
    size, device = (sizes.square, sizes.square), timer.device
    a, b = (torch.randn(size, device=device).bfloat16() for _ in range(2))
    c, d = (torch.randint(-127, 128, size, dtype=torch.int8, device=device) for _ in range(2))
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders = [
        Contender("int8", lambda: torch._int_mm(c, d.t()), 0),
        Contender("bf16", lambda: a @ b.t(), 0),
        Contender("copy", lambda: target.copy_(source), 0),
        Contender("nothing", lambda: target[:1].add_(1), 0),
    ]
    results, _ = timed(timer, contenders, sizes.repetitions)
    int8, bf16, copy, nothing = (spread.least for _, spread in results)
    operations = 2 * sizes.square**3
    return Ceilings(operations / int8, operations / bf16, 2 * sizes.copied / copy, nothing)


@dataclass
class Bench:
    """A run over all sizes: measures, prints and keeps rows."""

    timer: Timer
    sizes: Sizes
    results: Results
    output: Path | None

    def run(self) -> None:
        """Everything, shape by shape."""
        for shape in self.sizes.shapes:
            for tokens in self.sizes.tokens:
                self._shape(shape, tokens)
        for model, width in dict.fromkeys((s.model, s.width) for s in self.sizes.shapes):
            for tokens in self.sizes.tokens:
                contenders = quantizers(tokens, width, self.timer.device)
                self._part("quantizer", Shape(model, ("input",), 0, width), tokens, contenders)

    def _shape(self, shape: Shape, tokens: int) -> None:
        operands = Operands(tokens, shape.rows, shape.width, self.timer.device)
        others, absent = foreign(operands, self.results.others)
        self._part("product", shape, tokens, [*products(operands), *others], absent)
        self._part("smoothing", shape, tokens, smoothing(operands))

    def _part(
        self,
        part: Part,
        shape: Shape,
        tokens: int,
        contenders: Iterable[Contender],
        absent: dict[str, str] | None = None,
    ) -> None:
        measured, failed = timed(self.timer, contenders, self.sizes.repetitions)
        base = next(s.median for c, s in measured if c.name == BASELINES[part])
        where = (part, shape.model, shape.projections, tokens, shape.rows, shape.width)
        rows = [
            Row(
                *where,
                contender.name,
                seconds=spread,
                operations=contender.operations,
                bytes=contender.bytes,
                relative=spread.median / base,
                of_ceiling=self.results.ceilings.seconds(contender) / spread.median,
            )
            for contender, spread in measured
        ]
        missing = {**(absent or {}), **failed}
        rows += [Row(*where, name, status=status) for name, status in missing.items()]
        self.results.rows += rows
        self.results.save(self.output)
        console.print(table_of(rows))
        if self.timer.device.type == "cuda":
            torch.cuda.empty_cache()  # the graphs of the next shape need their own


def table_of(rows: list[Row]) -> Table:
    """The rows of one part and shape."""
    first = rows[0]
    size = f"{first.rows} x {first.width}" if first.rows else f"{first.width} channels"
    of = f"{first.model} {', '.join(first.projections)} ({size}), M = {first.tokens}"
    ratio = "speed" if first.part == "product" else "time"
    title = f"{first.part}: {of}; {ratio} of {BASELINES[first.part]} = 1"
    table = Table("operator", title=title, title_justify="left")
    for column in ("µs", "p20 to p80", ratio, "TOPS", "GB/s", "% of ceiling"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.operator, *_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    if row.seconds is None or row.relative is None or row.of_ceiling is None:
        return (row.status,)
    median, relative = row.seconds.median, row.relative
    return (
        f"{median * 1e6:.1f}",
        f"{row.seconds.p20 * 1e6:.1f} to {row.seconds.p80 * 1e6:.1f}",
        f"{1 / relative if row.part == 'product' else relative:.3f}",
        f"{row.operations / median / 1e12:.1f}" if row.operations else "",
        f"{row.bytes / median / 1e9:.0f}",
        f"{100 * row.of_ceiling:.0f}",
    )


@dataclass(frozen=True)
class Target:
    """What an operator should reach against another, at each number of tokens in a range.

    faster: the bound is a least speed, else a largest time. Weights of fewer rows than `WIDE` do
    not count; a weight counts once a projection that has its shape.
    """

    part: Part
    operator: str
    against: str
    bound: float
    faster: bool
    tokens: tuple[int, int] = (1, 2**31)

    def __str__(self) -> str:
        kind = "at least {} the speed" if self.faster else "at most {} the time"
        return f"{self.operator}: {kind.format(self.bound)} of {self.against}"

    def figures(self, rows: Iterable[Row]) -> dict[int, float]:
        """Tokens → the geometric mean of the ratios that were measured."""
        medians: dict[tuple[int, str, tuple[str, ...], int], dict[str, float]] = {}
        for row in rows:
            wide = row.part == "quantizer" or row.rows >= WIDE
            within = self.tokens[0] <= row.tokens <= self.tokens[1]
            if row.part == self.part and row.seconds is not None and wide and within:
                key = (row.tokens, row.model, row.projections, row.width)
                medians.setdefault(key, {})[row.operator] = row.seconds.median
        ratios: dict[int, list[float]] = {}
        for (tokens, _, names, _), times in medians.items():
            if self.operator in times and self.against in times:
                ratio = times[self.operator] / times[self.against]
                of_all = [1 / ratio if self.faster else ratio] * len(names)
                ratios.setdefault(tokens, []).extend(of_all)
        return {tokens: statistics.geometric_mean(found) for tokens, found in ratios.items()}

    def reached(self, figure: float) -> bool:
        """Whether a figure is good enough."""
        return figure >= self.bound if self.faster else figure <= self.bound


TARGETS = (
    Target("product", "int8_gemm", "bf16", 1.5, True, (2048, 2**31)),
    Target("product", "int8_gemm", "torch._int_mm", 0.9, True),
    Target("product", "int4_gemm, multipliers", "int4_gemm", 1.1, False),
    *(
        Target("smoothing", f"{name} + int8_gemm", BASELINES["smoothing"], 1.02, False)
        for name in ("quantize_token_groups", "quantize_smoothed")
    ),
    *(
        Target("product", name, "bf16", 2.8, True, (1, 1))
        for name in (
            "int4_gemm",
            "int4_gemm, multipliers",
            "weight_only_gemm, row",
            "weight_only_gemm, groups",
        )
    ),
    *(
        Target("quantizer", name, "copy", 1.3, False)
        for name in (
            "quantize_per_token",
            "quantize_token_groups",
            "quantize_smoothed",
            "hadamard_quantize",
            "hadamard_quantize, groups",
            "runtime_smooth_quantize, live",
        )
    ),
)


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Every target at every number of tokens at which it could be measured."""
    return [
        {
            "target": str(target),
            "tokens": tokens,
            "figure": figure,
            "verdict": "reached" if target.reached(figure) else "missed",
        }
        for target in TARGETS
        for tokens, figure in sorted(target.figures(rows).items())
    ]


def print_targets(targets: list[dict[str, Any]]) -> None:
    """A row a target, a column a number of tokens."""
    columns = sorted({found["tokens"] for found in targets})
    title = "targets (geometric means; products of weights with at least 4096 rows)"
    table = Table("target", *(f"M = {tokens}" for tokens in columns), title=title)
    for name in dict.fromkeys(found["target"] for found in targets):
        cells = {
            found["tokens"]: f"{found['figure']:.3f} {found['verdict']}"
            for found in targets
            if found["target"] == name
        }
        table.add_row(name, *(cells.get(tokens, "") for tokens in columns))
    console.print(table)


def plot_roofline(results: Results, path: Path) -> None:
    """Achieved operations a second against operations a byte, under the measured roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    rows = [row for row in results.rows if row.part == "product" and row.seconds is not None]
    for name in dict.fromkeys(row.operator for row in rows):
        of_name = [row for row in rows if row.operator == name and row.seconds is not None]
        axes.plot(
            [row.operations / row.bytes for row in of_name],
            [row.operations / row.seconds.median / 1e12 for row in of_name if row.seconds],
            "o",
            markersize=4,
            label=name,
        )
    intensities = [row.operations / row.bytes for row in rows]
    ceilings = results.ceilings
    for unit, peak in (("int8", ceilings.int8), ("bf16", ceilings.bf16)):
        ridge = peak / ceilings.bandwidth
        ends = sorted({min(intensities), ridge, max(*intensities, ridge)})
        roof = [min(peak, end * ceilings.bandwidth) / 1e12 for end in ends]
        axes.plot(ends, roof, "--", linewidth=1, label=f"measured roof, {unit}")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TOPS")
    axes.set_title(f"{results.device}{' (' + NO_MEASUREMENT + ')' if results.interpreted else ''}")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def version_of(package: str) -> str:
    """The version of a package, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def check(toy: bool, roofline: Path | None) -> None:
    """Leave with one line if this cannot run here."""
    if toy and not launch.INTERPRETED:
        raise SystemExit("--toy needs Triton's interpreter: set TRITON_INTERPRET=1")
    if not toy and launch.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: unset it to measure, or use --toy")
    if not toy and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here: kernels are measured on one, or use --toy")
    if roofline is not None and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--roofline needs matplotlib: pip install matplotlib")


def chosen(sizes: Sizes, model: str, tokens: list[int] | None, repetitions: int | None) -> Sizes:
    """The sizes that were asked for."""
    shapes = tuple(shape for shape in sizes.shapes if model.lower() in shape.model.lower())
    if not shapes:
        known = ", ".join(dict.fromkeys(shape.model for shape in sizes.shapes))
        raise SystemExit(f"no model is called {model!r}; there are: {known}")
    wanted = tuple(tokens) if tokens else sizes.tokens
    return Sizes(shapes, wanted, sizes.square, sizes.copied, repetitions or sizes.repetitions)


def started(timer: Timer, sizes: Sizes, toy: bool) -> Results:
    """The results, without rows: where they come from, and the ceilings."""
    others = {package: version_of(package) for package in sorted(set(OTHERS.values()))}
    if toy:
        others = {
            name: "needs a GPU" if version[0].isdigit() else version
            for name, version in others.items()
        }
    notes = (
        "torch._int_mm leaves int32 sums: its time holds no scaling",
        "torchao int8 dynamic quantizes its input too: its time holds that",
    )
    return Results(
        command=f"python scripts/{Path(__file__).name} {shlex.join(sys.argv[1:])}".strip(),
        interpreted=toy,
        device="the interpreter" if toy else torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        others=others,
        repetitions=sizes.repetitions,
        notes=(NO_MEASUREMENT, *notes) if toy else notes,
        ceilings=measure_ceilings(timer, sizes),
    )


@torch.no_grad()
def main(
    toy: Annotated[
        bool, typer.Option("--toy", help="Tiny sizes under Triton's interpreter, on the CPU.")
    ] = False,
    model: Annotated[str, typer.Option(help="Only models whose name contains this.")] = "",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Only this number of tokens; may be repeated.")
    ] = None,
    repetitions: Annotated[int | None, typer.Option(help="Of each measurement.", min=1)] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; benchmarks/<GPU>-kernels.json without it.")
    ] = None,
    roofline: Annotated[Path | None, typer.Option(help="Also draw a roofline here.")] = None,
) -> None:
    """Measure, print a table a shape, and write JSON."""
    check(toy, roofline)
    torch.manual_seed(0)
    sizes = chosen(TOY if toy else REAL, model, tokens, repetitions)
    timer = CpuTimer() if toy else GpuTimer()
    results = started(timer, sizes, toy)
    if output is None and not toy:
        output = Path("benchmarks") / f"{slug(results.device)}-kernels.json"
    console.print(f"{results.device}, torch {results.torch}, triton {results.triton}")
    for note in results.notes:
        console.print(note)
    if not toy:
        c = results.ceilings
        peaks = f"{c.int8 / 1e12:.0f} int8 TOPS, {c.bf16 / 1e12:.0f} bf16 TFLOPS"
        memory = f"{c.bandwidth / 1e9:.0f} GB/s, {c.floor * 1e6:.1f} µs for an empty kernel"
        console.print(f"measured ceilings: {peaks}, {memory}")
    Bench(timer, sizes, results, output).run()
    if not toy:  # toy sizes reach or miss nothing
        results.targets = verdicts(results.rows)
        print_targets(results.targets)
    results.complete = True
    results.save(output)
    if roofline is not None:
        plot_roofline(results, roofline)
    if toy:
        console.print(NO_MEASUREMENT)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
