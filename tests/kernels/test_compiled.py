"""Every Triton kernel compiled ahead of time for GPUs that are not here, and what came out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# float16 differs from bfloat16 in conversions and in the name of an instruction: for one NVIDIA.
DTYPES = dict.fromkeys(("sm_80", "gfx942"), ("bfloat16", "float16", "float32"))
DTYPES |= dict.fromkeys(("sm_89", "sm_90"), ("bfloat16", "float32"))
INTEGER_KERNELS = {"_integer_kernel", "_group_kernel"}
EVERY_KERNEL = {
    *INTEGER_KERNELS,
    "_add_splits_kernel",
    "_weight_only_kernel",
    "_per_token_kernel",
    "_token_groups_kernel",
    "_smoothed_kernel",
    "_one_scale_kernel",
    "_multipliers_kernel",
    "_channel_maxima_kernel",
    "_ordered_kernel",
    "_hadamard_kernel",
    "_hadamard_quantize_kernel",
    "_heads_kernel",
    "_attention_kernel",
    "_join_kernel",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Rows]:
    """The rows that the script finds for a target; all targets are compiled side by side."""
    directory = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_for(target: str) -> Rows:
        output = directory / f"{target}.json"
        dtypes = [word for dtype in DTYPES[target] for word in ("--dtype", dtype)]
        subprocess.run(
            [sys.executable, SCRIPT, "--target", target, "--output", output, *dtypes],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        rows: Rows = json.loads(output.read_text())
        return rows

    pool = ThreadPoolExecutor(os.cpu_count())
    running: dict[str, Future[Rows]] = {
        target: pool.submit(compile_for, target) for target in SHARED_MEMORY
    }
    return lambda target: running[target].result()


@pytest.mark.parametrize("target", SHARED_MEMORY)
class TestCompiled:
    def test_every_kernel_is_there(self, target: str, compiled: Callable[[str], Rows]) -> None:
        assert {row["kernel"] for row in compiled(target)} == EVERY_KERNEL

    def test_products_of_integers_run_on_the_int8_tensor_cores(
        self, target: str, compiled: Callable[[str], Rows]
    ) -> None:
        rows = [
            row
            for row in compiled(target)
            if row["kernel"] in INTEGER_KERNELS
            or (row["kernel"] == "_attention_kernel" and row["case"].startswith("int8"))
        ]
        assert rows
        assert not [row for row in rows if row["int8_tensor_cores"] == 0]

    def test_products_of_16_bit_floats_and_rotations_run_on_tensor_cores(
        self, target: str, compiled: Callable[[str], Rows]
    ) -> None:
        rows = [
            row
            for row in compiled(target)
            if row["kernel"].startswith("_hadamard")
            or (
                row["kernel"] in ("_weight_only_kernel", "_attention_kernel")
                and "float32" not in row["case"]
            )
        ]
        assert rows
        assert not [row for row in rows if row["float_tensor_cores"] == 0]

    def test_no_register_spills(self, target: str, compiled: Callable[[str], Rows]) -> None:
        assert not [row for row in compiled(target) if row["spills"]]

    def test_no_wgmma_reads_what_came_later(
        self, target: str, compiled: Callable[[str], Rows]
    ) -> None:
        assert not [row for row in compiled(target) if row["wgmma_registers_written"]]

    def test_shared_memory_is_within_the_chips(
        self, target: str, compiled: Callable[[str], Rows]
    ) -> None:
        rows = compiled(target)
        assert all(row["shared_memory"] <= SHARED_MEMORY[target] for row in rows)
