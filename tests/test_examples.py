"""The examples run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest

from smoothq import architectures, load_recipe, preset
from smoothq.recipe.recipe import Preset

EXAMPLES = Path(__file__).parent.parent / "examples"


PROGRAMS = {
    "quantize_and_load": ["{model}", "{scratch}/out"],
    "model_in_memory": ["{model}"],
    "own_recipe": ["{model}", "{scratch}/out"],
    "add_family": [],
    "evaluate_task": ["{model}"],
    "look_at_outliers": ["{model}", "{scratch}/report.html"],
}


def test_every_program_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name, float_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    program = EXAMPLES / f"{name}.py"
    places = {"model": str(float_checkpoint("llama")), "scratch": str(tmp_path)}
    arguments = [argument.format(**places) for argument in PROGRAMS[name]]
    monkeypatch.setattr(sys, "argv", [program.name, *arguments])
    monkeypatch.setattr("smoothq.architectures._BY_MODEL_TYPE", {**architectures._BY_MODEL_TYPE})
    runpy.run_path(str(program))
    assert f"python examples/{name}.py" in program.read_text()
    assert capsys.readouterr().out.strip()
    for argument in arguments:
        assert Path(argument).exists()


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
