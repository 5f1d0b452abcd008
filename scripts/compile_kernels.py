"""Compile every Triton kernel for a GPU that need not be there, and read what came out.

    python scripts/compile_kernels.py --target sm_90

Each operator runs once a form and dtype on small CPU tensors, through a driver that compiles for
the target, every tile of the autotuner's list, and launches nothing. What a person would look at
is then printed: registers, spills, shared memory, and the tensor-core instructions found.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from smoothq.kernels import triton as operators
from smoothq.kernels.triton import launch
from smoothq.rounding.packing import pack
from smoothq.transforms.hadamard import Hadamard


@dataclass(frozen=True)
class Chip:
    """A target of the compiler. shared_memory: bytes that one program may take."""

    target: GPUTarget
    shared_memory: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024),  # A100
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 * 1024),  # L4, L40S, RTX 40
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024),  # H100, H200
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024),  # B200
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 160 * 1024),  # MI350
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),  # MI300
}
TENSOR_CORES = {
    "fp8": r"(?:mma\.sync|wgmma)\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4|v_mfma_f32\w+_f8f6f4",
    "mx": r"tcgen05\.mma\S*kind::(?:mxf8f6f4|mxf4)\.|v_mfma_scale\w+_f8f6f4",
    "int8": r"mma\.sync\S*\.s8\.s8|wgmma\S*\.s8\.s8|v_mfma_i32\w+_i8",
    "float": r"mma\.sync\S*\.(?:bf16|f16|tf32)\S*|wgmma\S*\.(?:bf16|f16|tf32)\S*|v_mfma_f32\w+",
}


@dataclass
class Compiled:
    """One kernel for one target. spills: bytes of a thread's stack, or registers on AMD."""

    case: str
    kernel: str
    warps: int
    shared_memory: int
    registers: int
    spills: int
    int8_tensor_cores: int
    float_tensor_cores: int
    fp8_tensor_cores: int
    mx_tensor_cores: int
    wgmma_registers_written: int  # of wgmmas in flight: the product would read what came later


class CompilingDriver:
    """Stands in for a GPU's driver: kernels are compiled and loaded nowhere."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return self.chip.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.chip.shared_memory}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(kernel: Callable[[], Any], quantiles: Any) -> list[float]:
            kernel()
            return [0.0] * len(quantiles)

        return once


Case = tuple[str, Callable[[], object]]

ROWS, WIDTH, DOWN, GROUP = 256, 4096, 14336, 128
WIDEST = 28672  # Llama 3 70B's down_proj


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cases(dtypes: Iterable[str], chip: Chip) -> Iterator[Case]:
    """Every operator that a chip runs, in every form, its name first, at widths of real models."""
    target = (chip.target.backend, chip.target.arch)
    for kind in dtypes:
        dtype = DTYPES[kind]
        forms = [*weight_only_cases(dtype), *fp_cases(dtype), *quantizer_cases(dtype)]
        if target in launch.FP8_TARGETS:
            forms += fp8_cases(dtype)
        if target in launch.MX_TARGETS:
            forms += mx_cases(dtype)
        if dtype != torch.float16:  # it differs from bfloat16 in conversions only
            forms += [*integer_cases(dtype), *attention_cases(dtype)]
        for name, run in forms:
            yield f"{name}, {kind}", run


def integer_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of codes, with results of a dtype."""
    weight = torch.zeros(ROWS, WIDTH, dtype=torch.int8)
    packed, per_row = pack(weight, 4), torch.ones(ROWS)
    multiplier = torch.ones(ROWS, WIDTH // GROUP, dtype=torch.int8)
    for tokens in (1, 64):
        codes, scale = torch.zeros(tokens, WIDTH, dtype=torch.int8), torch.ones(tokens, 1)
        bias = torch.ones(ROWS, dtype=dtype)
        operands = (codes, scale, packed, per_row)
        yield (
            f"int8_gemm, {tokens} tokens",
            partial(operators.int8_gemm, codes, scale, weight, per_row, bias, dtype),
        )
        yield (
            f"int4_gemm, {tokens} tokens",
            partial(operators.int4_gemm, *operands, None, None, dtype),
        )
        yield (
            f"int4_gemm, multipliers, {tokens} tokens",
            partial(operators.int4_gemm, *operands, multiplier, None, dtype),
        )
        ends = torch.tensor([tokens // 2, tokens, tokens])
        for form, weights, multipliers in (
            ("int8", [weight] * 3, []),
            ("4 bits", [packed] * 3, []),
            ("4 bits, multipliers", [packed] * 3, [multiplier] * 3),
        ):
            steps, biases = [per_row] * 3, [] if multipliers else [bias] * 3
            experts = (ends, weights, steps, multipliers, biases, dtype)
            yield (
                f"expert_gemm, {form}, {tokens} tokens",
                partial(operators.expert_gemm, codes, scale, *experts),
            )
        shaped = (codes[None], scale[None])
        per_group = torch.ones(ROWS, WIDTH // GROUP).bfloat16()
        yield (
            f"group_gemm, weight groups, {tokens} tokens",
            partial(
                operators.group_gemm, *shaped, None, None, weight, per_group, None, GROUP, dtype
            ),
        )
        blocks = torch.ones(1, WIDTH // GROUP)
        yield (
            f"group_gemm, blocks, {tokens} tokens",
            partial(
                operators.group_gemm,
                *(*shaped, blocks, None, weight, per_row[:, None], None, GROUP, dtype),
            ),
        )


def weight_only_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of floats of a dtype and packed weights."""
    weight = torch.zeros(ROWS, WIDTH, dtype=torch.int8)
    packed, per_row = pack(weight, 4), torch.ones(ROWS, 1)
    per_group = torch.ones(ROWS, WIDTH // GROUP).bfloat16()
    multiplier = torch.ones(ROWS, WIDTH // GROUP, dtype=torch.int8)
    for tokens in (1, 64):
        product = partial(operators.weight_only_gemm, torch.ones(tokens, WIDTH, dtype=dtype))
        forms = {
            "4 bits": (packed, per_row, None, None, 4),
            "4 bits, groups": (packed, per_group, None, None, 4),
            "4 bits, multipliers": (packed, per_row, multiplier, None, 4),
            "8 bits": (weight, per_row, None, None, 8),
        }
        for form, operands in forms.items():
            yield f"weight_only_gemm, {form}, {tokens} tokens", partial(product, *operands)
        bias, ends = torch.ones(ROWS, dtype=dtype), torch.tensor([tokens // 2, tokens, tokens])
        of_experts = partial(
            operators.expert_weight_only_gemm, torch.ones(tokens, WIDTH, dtype=dtype), ends
        )
        for form, (codes, scale, multipliers, _, bits) in forms.items():
            lists = ([codes] * 3, [scale] * 3, [] if multipliers is None else [multipliers] * 3)
            yield (
                f"expert_weight_only_gemm, {form}, {tokens} tokens",
                partial(of_experts, *lists, [bias] * 3, bits),
            )


def fp_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of floats of a dtype and floating-point codes, or words, and `fp_quantize`."""
    bytes_ = torch.zeros(ROWS, WIDTH, dtype=torch.uint8)
    pairs, one = bytes_[:, : WIDTH // 2].contiguous(), torch.ones(1)
    scales = {size: bytes_[:, : WIDTH // size].contiguous() for size in (16, 32)}
    per_row, per_group = torch.ones(ROWS, 1), torch.ones(ROWS, WIDTH // 32).bfloat16()
    for tokens in (1, 64):
        x = torch.ones(tokens, WIDTH, dtype=dtype)
        forms = {
            "E4M3": (bytes_, per_row, None, None, "e4m3"),
            "E2M1": (pairs, per_row, None, None, "e2m1"),
            "MXFP8": (bytes_, scales[32], None, None, "e4m3"),
            "MXFP4": (pairs, scales[32], None, None, "e2m1"),
            "NVFP4": (pairs, scales[16], one, None, "e2m1"),
        }
        for form, operands in forms.items():
            yield f"fp_gemm, {form}, {tokens} tokens", partial(operators.fp_gemm, x, *operands)
        for bits in (2, 3):
            words = torch.zeros(ROWS, WIDTH * bits // 32, dtype=torch.int32)
            weight = (words, per_group, None, None, bits)
            yield (
                f"weight_only_gemm, {bits} bits, groups, {tokens} tokens",
                partial(operators.weight_only_gemm, x, *weight),
            )
    x = torch.ones(1, 2, DOWN, dtype=dtype)
    quantize = partial(operators.fp_quantize, x)
    yield "fp_quantize, E4M3, token", partial(quantize, "e4m3", "token")
    yield "fp_quantize, E4M3, static", partial(quantize, "e4m3", "static", 0, one)
    yield "fp8_quantize, token", partial(operators.fp8_quantize, x, "token")
    yield "fp8_quantize, groups", partial(operators.fp8_quantize, x, "group", GROUP)
    yield "fp_quantize, MXFP4", partial(quantize, "e2m1", "e8m0", 32)
    yield "fp_quantize, NVFP4", partial(quantize, "e2m1", "e4m3", 16, one)


def fp8_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of E4M3 codes on both sides, with results of a dtype."""
    weight, bias = torch.zeros(ROWS, WIDTH, dtype=torch.uint8), torch.ones(ROWS, dtype=dtype)
    for tokens in (1, 64):
        codes = torch.zeros(tokens, WIDTH, dtype=torch.uint8)
        for form, groups in {"rows": 1, "blocks": WIDTH // GROUP}.items():
            operands = (codes, torch.ones(tokens, groups), weight, torch.ones(ROWS, groups), bias)
            yield (
                f"fp8_gemm, {form}, {tokens} tokens",
                partial(operators.fp8_gemm, *operands, dtype),
            )


def mx_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The products of MX codes on both sides, with results of a dtype, and their quantizer."""
    bias, x = torch.ones(ROWS, dtype=dtype), torch.ones(1, 2, DOWN, dtype=dtype)
    for form, element, row_bytes in (("MXFP8", "e4m3", WIDTH), ("MXFP4", "e2m1", WIDTH // 2)):
        for tokens in (1, 64):
            codes, weight = (
                (torch.zeros(n, row_bytes, dtype=torch.uint8), byte_scales(n))
                for n in (tokens, ROWS)
            )
            yield (
                f"mx_gemm, {form}, {tokens} tokens",
                partial(operators.mx_gemm, *codes, *weight, bias, element, dtype),
            )
        yield f"mx_quantize, {form}", partial(operators.mx_quantize, x, element)


def byte_scales(rows: int) -> Tensor:
    """E8M0 bytes of a matrix with that many rows."""
    return torch.zeros(rows, WIDTH // 32, dtype=torch.uint8)


def quantizer_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The quantizers and rotations of inputs of a dtype."""
    x = torch.ones(1, 2, DOWN, dtype=dtype)
    ones = torch.ones(DOWN, dtype=torch.int8)
    rotation, wide = Hadamard.of(DOWN, seed=0), Hadamard.of(11008, seed=0)
    factors = (rotation.signs(), *rotation.factors(operators.left_factor(rotation.base, DOWN)))
    wide_factors = (wide.signs(), *wide.factors())  # a left factor too wide to be fused
    for full_range in (False, True):
        yield (
            "quantize_per_token" + ", full range" * full_range,
            partial(operators.quantize_per_token, x, 4, 1.0, full_range),
        )
    widest = torch.ones(1, 2, WIDEST, dtype=dtype)
    yield "quantize_per_token, widest", partial(operators.quantize_per_token, widest, 8)
    yield "quantize_per_tensor", partial(operators.quantize_per_tensor, x, 8)
    yield "static_quantize", partial(operators.static_quantize, x, torch.ones(()), 8)
    yield "quantize_token_groups", partial(operators.quantize_token_groups, x, 4, GROUP)
    yield "quantize_smoothed", partial(operators.quantize_smoothed, x, ones, 4)
    live = partial(operators.runtime_smooth_quantize, x, 4)
    yield "runtime_smooth_quantize", partial(live, GROUP)
    yield "runtime_smooth_quantize, normalised", partial(live, 1, normalise=True)
    yield "hadamard", partial(operators.hadamard, x[..., :11008], *wide_factors)
    yield "hadamard_quantize", partial(operators.hadamard_quantize, x, *factors, 4)
    yield "hadamard_quantize, groups", partial(operators.hadamard_quantize, x, *factors, 4, GROUP)


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The rows of a cache, and attention over them, in prefill and in decoding."""
    heads, dim, tokens = 2, 128, 1024
    x = torch.ones(1, heads, tokens, dim, dtype=dtype)
    start = torch.zeros(1, dtype=torch.int64)
    for bits in (8, 4):
        yield f"quantize_heads, {bits} bits", partial(operators.quantize_heads, x, bits, None)
        rows = torch.zeros(1, heads, tokens, dim * bits // 8 + 4, dtype=torch.uint8)
        groups = torch.zeros(1, heads, tokens, dim * bits // 8 + 16, dtype=torch.uint8)
        for length in (1, 64):
            form = f"{bits} bits, {length} queries"
            query = torch.ones(1, 4 * heads, length, dim, dtype=dtype)
            codes, scale = query.to(torch.int8), torch.ones(1, 4 * heads, length, 1)
            mask = torch.ones(1, 1, length, tokens, dtype=torch.bool)
            attend = partial(operators.cached_attention, query)
            plain = (rows, rows, None, None, None, mask, 0.1, bits, None)
            first = (groups, groups, x[:, :, :4], x[:, :, :4], start, mask, 0.1, bits, 32)
            integer = partial(operators.int8_attention, codes, scale, rows)
            yield f"cached_attention, {form}", partial(attend, *plain)
            yield f"cached_attention, groups, first tokens, {form}", partial(attend, *first)
            yield f"int8_attention, {form}", partial(integer, rows, mask, 0.1, bits, dtype)
            if bits == 8:
                yield (
                    f"int8_attention, float values, {form}",
                    partial(integer, x, mask, 0.1, bits, dtype),
                )


def compile_all(chip: Chip, only: str = "", dtypes: Iterable[str] = DTYPES) -> list[Compiled]:
    """Compile every case of some dtypes whose name contains `only`."""
    loaded: dict[str, tuple[str, str, dict[str, str]]] = {}
    case = ""

    def remember(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        loaded.setdefault(key, (case, name, dict(files)))

    triton.runtime.driver.set_active(CompilingDriver(chip))
    with tempfile.TemporaryDirectory() as cache:  # timings found here must reach no real cache
        triton.knobs.cache.dir = cache
        # Line numbers are for debuggers; carrying them through costs a sixth of the time.
        triton.knobs.compilation.disable_line_info = True
        triton.knobs.runtime.kernel_load_end_hook.add(remember)
        for case, run in cases(dtypes, chip):
            if only in case:
                run()
        return [examine(chip, *entry) for entry in loaded.values()]


def examine(chip: Chip, case: str, name: str, files: dict[str, str]) -> Compiled:
    """What the assembler says of a compiled kernel."""
    by_kind = {Path(file).suffix: Path(path) for file, path in files.items()}
    metadata = json.loads(by_kind[".json"].read_text())
    amd = chip.target.backend == "hip"
    assembly = by_kind[".amdgcn" if amd else ".ptx"].read_text()
    if amd:
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    else:
        report = resource_usage(by_kind[".cubin"])
        registers = _number(r"REG:(\d+)", report)
        spills = _number(r"STACK:(\d+)", report) + _number(r"LOCAL:(\d+)", report)
    return Compiled(
        case,
        name,
        metadata["num_warps"],
        metadata["shared"],
        registers,
        spills,
        len(re.findall(TENSOR_CORES["int8"], assembly)),
        len(re.findall(TENSOR_CORES["float"], assembly)),
        len(re.findall(TENSOR_CORES["fp8"], assembly)),
        len(re.findall(TENSOR_CORES["mx"], assembly)),
        written_in_flight(machine_code(by_kind[".cubin"])) if "wgmma" in assembly else 0,
    )


def resource_usage(cubin: Path) -> str:
    """What the kernel that ptxas made takes, as Triton's own cuobjdump reads it."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def machine_code(cubin: Path) -> str:
    """A kernel's instructions, as Triton's own nvdisasm writes them."""
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Instruction:
    """One instruction of sm_90. target: the index that it branches to, or None."""

    conditional: bool
    operation: str
    operands: str
    target: int | None = None

    def writes(self) -> set[int]:
        """The registers that it writes; none for a wgmma, whose sums wait by themselves."""
        result = re.match(r"R(\d+)", self.operands)
        if result is None or self.is_wgmma:
            return set()
        wide = re.search(r"\.(128|64|WIDE|4|2)\b", self.operation)
        count = {"128": 4, "4": 4, "64": 2, "WIDE": 2, "2": 2}[wide[1]] if wide else 1
        return set(range(int(result[1]), int(result[1]) + count))

    @property
    def is_wgmma(self) -> bool:
        """Whether it is a product of the tensor cores that runs on by itself."""
        return re.match("[HIQ]GMMA", self.operation) is not None

    def left_operand(self) -> set[int]:
        """The registers that a wgmma reads; none where shared memory holds its left operand."""
        left = re.match(r"R\d+, R(\d+)", self.operands)
        return set(range(int(left[1]), int(left[1]) + 4)) if left else set()


def instructions(code: str) -> list[Instruction]:
    """The instructions of a kernel, from what nvdisasm writes."""
    pattern = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?(\S+)\s*(.*?)\s*;")
    labels: dict[str, int] = {}
    rows: list[tuple[bool, str, str]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(rows)
        elif row := pattern.search(line):
            rows.append((row[1] is not None, row[2], row[3]))
    targets = [re.search(r"\.L_x_\d+", row[2]) if row[1] == "BRA" else None for row in rows]
    return [
        Instruction(*row, labels[target[0]] if target else None)
        for row, target in zip(rows, targets, strict=True)
    ]


TRIPS = 3  # of every loop: what one leaves in flight meets the next two


def walk(kernel: list[Instruction]) -> Iterator[Instruction]:
    """The instructions in an order in which they may run: each loop TRIPS times, no detours."""
    trips: Counter[int] = Counter()
    at = 0
    while at < len(kernel):
        instruction = kernel[at]
        yield instruction
        at += 1
        if instruction.target is not None:
            back = instruction.target < at
            trips[at] += 1
            if (back and trips[at] < TRIPS) or not (back or instruction.conditional):
                at = instruction.target


def written_in_flight(code: str) -> int:
    """How often registers that a wgmma in flight may still read are written.

    Nothing makes a later instruction wait until a wgmma has read its left operand, four registers a
    thread, but `WARPGROUP.DEPBAR`, which lets the last groups stay in flight.

    Args:
        code: of one kernel for sm_90, as nvdisasm writes it.
    """
    written = 0
    in_flight: list[set[int]] = [set()]  # registers by group, the one that is still open last
    for instruction in walk(instructions(code)):
        if instruction.operation == "WARPGROUP.DEPBAR.LE":
            staying = int(instruction.operands.rpartition(",")[2], 16)
            in_flight = in_flight[-staying - 1 :]
        elif instruction.is_wgmma:
            in_flight[-1] |= instruction.left_operand()
            if "gsb0" in instruction.operands:
                in_flight.append(set())
        else:
            written += any(instruction.writes() & group for group in in_flight)
    return written


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's report has no {pattern!r}")
    return int(found[1])


def main(
    target: Annotated[str, typer.Option(help=f"One of {', '.join(CHIPS)}.")] = "sm_90",
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}, all by default; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the rows as JSON here.")] = None,
) -> None:
    """Compile, and print a row for each kernel."""
    if launch.INTERPRETED:
        raise typer.BadParameter("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = compile_all(CHIPS[target], only, dtype or DTYPES)
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    columns = list(asdict(rows[0]))
    table = Table(*columns, title=target)
    for row in rows:
        table.add_row(*map(str, asdict(row).values()))
    Console(width=None if Console().is_terminal else 160).print(table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
