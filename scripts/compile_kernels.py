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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

from smoothq.checkpoint.packing import pack
from smoothq.kernels import triton as operators
from smoothq.kernels.triton import launch
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
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),  # MI300
}
TENSOR_CORES = {
    "int8": r"mma\.sync\S*\.s8\.s8|wgmma\S*\.s8\.s8|v_mfma_i32\w+_i8",
    "float": r"mma\.sync\S*\.(?:bf16|f16|tf32)\S*|wgmma\S*\.(?:bf16|f16|tf32)\S*|v_mfma_f32\w+",
}


@dataclass
class Compiled:
    """One kernel for one target. spills: bytes, of stores and loads, or of scratch on AMD."""

    case: str
    kernel: str
    warps: int
    shared_memory: int
    registers: int
    spills: int
    int8_tensor_cores: int
    float_tensor_cores: int


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

    def load_binary(self, *args: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(kernel: Callable[[], Any], quantiles: Any) -> list[float]:
            kernel()
            return [0.0] * len(quantiles)

        return once


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every operator in every form, its name first, at widths that real models have."""
    width, rows, group = 4096, 256, 128
    packed = pack(torch.zeros(rows, width, dtype=torch.int8), 4).flatten(1)
    weight = torch.zeros(rows, width, dtype=torch.int8)
    per_row, per_group = torch.ones(rows), torch.ones(rows, width // group).bfloat16()
    multiplier = torch.ones(rows, width // group, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kind, bias = str(dtype).removeprefix("torch."), torch.ones(rows, dtype=dtype)
        for tokens in (1, 64):
            codes, scale = torch.zeros(tokens, width, dtype=torch.int8), torch.ones(tokens, 1)
            x, where = torch.ones(tokens, width, dtype=dtype), f"{kind}, {tokens} tokens"
            yield (
                f"int8_gemm, {where}",
                lambda c=codes, s=scale, b=bias, d=dtype: operators.int8_gemm(
                    c, s, weight, per_row, b, d
                ),
            )
            for name, m in (("", None), (" multipliers,", multiplier)):
                yield (
                    f"int4_gemm,{name} {where}",
                    lambda c=codes, s=scale, m=m, d=dtype: operators.int4_gemm(
                        c, s, packed, per_row, m, None, d
                    ),
                )
                yield (
                    f"weight_only_gemm, 4 bits,{name} {where}",
                    lambda x=x, m=m: operators.weight_only_gemm(
                        x, packed, per_row[:, None], m, None, 4
                    ),
                )
            yield (
                f"weight_only_gemm, 4 bits, groups, {where}",
                lambda x=x: operators.weight_only_gemm(x, packed, per_group, None, None, 4),
            )
            yield (
                f"weight_only_gemm, 8 bits, {where}",
                lambda x=x: operators.weight_only_gemm(x, weight, per_row[:, None], None, None, 8),
            )
        codes, scale = torch.zeros(1, 64, width, dtype=torch.int8), torch.ones(1, 64, 1)
        blocks = torch.ones(1, width // group)
        yield (
            f"group_gemm, blocks, {kind}",
            lambda c=codes, s=scale, b=blocks, d=dtype: operators.group_gemm(
                c, s, b, None, weight, per_row[:, None], None, group, d
            ),
        )
        yield (
            f"group_gemm, weight groups, {kind}",
            lambda c=codes, s=scale, d=dtype: operators.group_gemm(
                c, s, None, None, weight, per_group, None, group, d
            ),
        )
        x = torch.ones(1, 2, 14336, dtype=dtype)
        ones = torch.ones(14336, dtype=torch.int8)
        rotation = Hadamard.of(14336, seed=0)
        factors = (rotation.signs(), *rotation.factors())
        wide = Hadamard.of(11008, seed=0)  # its left factor is too wide to be fused
        wide_factors = (wide.signs(), *wide.factors())
        for name, call in {
            "quantize_per_token": lambda x=x: operators.quantize_per_token(x, 4),
            "quantize_per_tensor": lambda x=x: operators.quantize_per_tensor(x, 8),
            "static_quantize": lambda x=x: operators.static_quantize(x, torch.ones(()), 8),
            "quantize_token_groups": lambda x=x: operators.quantize_token_groups(x, 4, group),
            "quantize_smoothed": lambda x=x, m=ones: operators.quantize_smoothed(x, m, 4),
            "runtime_smooth_quantize": lambda x=x: operators.runtime_smooth_quantize(x, 4, group),
            "runtime_smooth_quantize, normalised": lambda x=x: operators.runtime_smooth_quantize(
                x, 4, 1, normalise=True
            ),
            "hadamard": lambda x=x, f=wide_factors: operators.hadamard(x[..., :11008], *f),
            "hadamard_quantize": lambda x=x, f=factors: operators.hadamard_quantize(x, *f, 4),
            "hadamard_quantize, groups": lambda x=x, f=factors: operators.hadamard_quantize(
                x, *f, 4, group
            ),
        }.items():
            yield f"{name}, {kind}", call


def compile_all(chip: Chip, only: str = "") -> list[Compiled]:
    """Compile every case whose name contains `only`."""
    loaded: list[tuple[str, str, dict[str, str]]] = []
    case = ""

    def remember(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        loaded.append((case, name, dict(files)))

    triton.runtime.driver.set_active(CompilingDriver(chip))
    with tempfile.TemporaryDirectory() as cache:  # timings found here must reach no real cache
        triton.knobs.cache.dir = cache
        triton.knobs.runtime.kernel_load_end_hook.add(remember)
        for case, run in cases():
            if only in case:
                run()
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda entry: examine(chip, *entry), loaded))


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
        report = assemble(chip, by_kind[".ptx"])
        registers = _number(r"Used (\d+) registers", report)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return Compiled(
        case,
        name,
        metadata["num_warps"],
        metadata["shared"],
        registers,
        spills,
        *(len(re.findall(pattern, assembly)) for pattern in TENSOR_CORES.values()),
    )


def assemble(chip: Chip, ptx: Path) -> str:
    """The report of Triton's own ptxas on a kernel."""
    arch = chip.target.arch
    command = [
        triton.knobs.nvidia.ptxas.path,
        "-v",
        f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
        str(ptx),
        "-o",
        "/dev/null",
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's report has no {pattern!r}")
    return int(found[1])


def main(
    target: Annotated[str, typer.Option(help=f"One of {', '.join(CHIPS)}.")] = "sm_90",
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    output: Annotated[Path | None, typer.Option(help="Also write the rows as JSON here.")] = None,
) -> None:
    """Compile, and print a row for each kernel."""
    if launch.INTERPRETED:
        raise typer.BadParameter("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = compile_all(CHIPS[target], only)
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
