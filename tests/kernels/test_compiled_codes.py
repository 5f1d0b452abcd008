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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--target", target, "--only", "fp8_", "--dtype", "bfloat16"]
    result = subprocess.run(
        [*command, "--output", tmp_path / "rows.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["shared_memory"] <= SHARED_MEMORY[target] for row in rows)
    assert not [row for row in rows if row["spills"] or row["wgmma_registers_written"]]
    products = [row for row in rows if row["kernel"] == "_fp8_kernel"]
    assert products
    for row in products:
        floats = row["float_tensor_cores"]
        if target == "gfx950":  # an instruction of floats by its name as well
            floats -= row["fp8_tensor_cores"]
        assert row["fp8_tensor_cores"] > 0
        assert floats == 0
