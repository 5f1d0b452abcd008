"""The examples run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest

from smoothq import load_recipe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_quantize_and_load(float_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    model, out = float_checkpoint("llama"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["", str(model), str(out)])
    runpy.run_path(str(EXAMPLES / "quantize_and_load.py"))
    assert (out / "config.json").is_file()
    assert capsys.readouterr().out.strip()


def test_the_recipe_is_valid() -> None:
    assert load_recipe(EXAMPLES / "own_recipe.yaml").weights.group_size == 32
