"""Products of floating-point codes, compiled for the GPUs that multiply them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"
SHARED_MEMORY = {"sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
SHARED_MEMORY |= {"gfx950": 160 * 1024}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_codes_run_on_the_tensor_cores_for_them(target: str, tmp_path: Path) -> None:
    """And nowhere as the floats that they stand for; no register spills."""
    products = {"fp8": "_fp8_kernel"}
    if target in ("sm_100", "gfx950"):
        products["mx"] = "_mx_kernel"
    rows = [row for kind in products for row in compiled(target, kind, tmp_path)]
    assert all(row["shared_memory"] <= SHARED_MEMORY[target] for row in rows)
    assert not [row for row in rows if row["spills"] or row["wgmma_registers_written"]]
    for kind, kernel in products.items():
        cores = [row for row in rows if row["kernel"] == kernel]
        assert cores
        for row in cores:
            floats = row["float_tensor_cores"]
            if target == "gfx950" and kind == "fp8":  # named as one of floats
                floats -= row["fp8_tensor_cores"]
            assert row[f"{kind}_tensor_cores"] > 0
            assert floats == 0


def compiled(target: str, kind: str, directory: Path) -> list[dict[str, Any]]:
    """The rows that the script finds for operators of a kind of codes, and bfloat16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        SCRIPT,
        "--target",
        target,
        "--only",
        f"{kind}_",
        "--dtype",
        "bfloat16",
    ]
    result = subprocess.run(
        [*command, "--output", directory / "rows.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads((directory / "rows.json").read_text())
    return rows
