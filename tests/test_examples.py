"""The examples run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest

from smoothq import load_recipe, preset
from smoothq.recipe import Preset

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_quantize_and_load(float_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    model, out = float_checkpoint("llama"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["", str(model), str(out)])
    runpy.run_path(str(EXAMPLES / "quantize_and_load.py"))
    assert (out / "config.json").is_file()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_valid_and_says_how_it_is_run(path: Path) -> None:
    assert load_recipe(path).weights.bits == 4
    assert f"--recipe examples/{path.name}" in path.read_text()


@pytest.mark.parametrize("bits", ["w4a4", "w4a8", "w4a16"])
def test_quarot_is_compared_in_the_same_number_formats(bits: Preset) -> None:
    ours, quarot = preset(bits), load_recipe(EXAMPLES / f"quarot_{bits}.yaml")
    assert quarot.rotation is not None
    assert quarot.smoothing is quarot.tuning is None
    for section in ("weights", "activations", "runtime_smoothing", "gptq", "calibration"):
        assert getattr(quarot, section) == getattr(ours, section), section
