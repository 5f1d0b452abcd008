"""Every Triton kernel compiled ahead of time for GPUs that are not here, and what came out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# float16 differs from bfloat16 in conversions and in the name of an instruction: for one NVIDIA.
DTYPES = dict.fromkeys(("sm_80", "gfx942"), ("bfloat16", "float16", "float32"))
DTYPES |= dict.fromkeys(("sm_89", "sm_90"), ("bfloat16", "float32"))
INTEGER_KERNELS = {"_integer_kernel", "_expert_kernel", "_group_kernel"}
FLOAT_KERNELS = {
    "_weight_only_kernel",
    "_expert_weight_only_kernel",
    "_fp_kernel",
    "_attention_kernel",
}
EVERY_KERNEL = {
    *INTEGER_KERNELS,
    *FLOAT_KERNELS,
    "_add_splits_kernel",
    "_fp_quantize_kernel",
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
    "_join_kernel",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Rows = list[dict[str, Any]]


# A forked process a target, side by side: what all of them import and hash is so once.
COMPILE = """
import json, multiprocessing, os, sys
from pathlib import Path
from compile_kernels import main
from triton.runtime.cache import triton_key

def compile_for(target, dtypes):
    main(target, "", dtypes, Path(sys.argv[1]) / f"{target}.json")

triton_key()
with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
    pool.starmap(compile_for, json.loads(sys.argv[2]).items(), chunksize=1)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """The rows that the script finds for each target."""
    directory = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, (str(SCRIPTS), environment.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, directory, json.dumps(DTYPES)],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return {target: json.loads((directory / f"{target}.json").read_text()) for target in DTYPES}


@pytest.mark.parametrize("target", SHARED_MEMORY)
class TestCompiled:
    def test_every_kernel_is_there(self, target: str, compiled: dict[str, Rows]) -> None:
        of_codes = {"_fp8_kernel"} if target in ("sm_89", "sm_90") else set()
        assert {row["kernel"] for row in compiled[target]} == EVERY_KERNEL | of_codes

    def test_products_of_integers_run_on_the_int8_tensor_cores(
        self, target: str, compiled: dict[str, Rows]
    ) -> None:
        rows = [
            row
            for row in compiled[target]
            if row["kernel"] in INTEGER_KERNELS
            or (row["kernel"] == "_attention_kernel" and row["case"].startswith("int8"))
        ]
        assert rows
        assert not [row for row in rows if row["int8_tensor_cores"] == 0]

    def test_products_of_16_bit_floats_and_rotations_run_on_tensor_cores(
        self, target: str, compiled: dict[str, Rows]
    ) -> None:
        rows = [
            row
            for row in compiled[target]
            if row["kernel"].startswith("_hadamard")
            or (row["kernel"] in FLOAT_KERNELS and "float32" not in row["case"])
        ]
        assert rows
        assert not [row for row in rows if row["float_tensor_cores"] == 0]

    def test_no_register_spills(self, target: str, compiled: dict[str, Rows]) -> None:
        assert not [row for row in compiled[target] if row["spills"]]

    def test_no_wgmma_reads_what_came_later(self, target: str, compiled: dict[str, Rows]) -> None:
        assert not [row for row in compiled[target] if row["wgmma_registers_written"]]

    def test_shared_memory_is_within_the_chips(
        self, target: str, compiled: dict[str, Rows]
    ) -> None:
        rows = compiled[target]
        assert all(row["shared_memory"] <= SHARED_MEMORY[target] for row in rows)
