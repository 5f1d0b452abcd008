"""The accuracy script: what it measures once, what it keeps, and the page's table of it."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest

from smoothq import preset
from smoothq.cli.commands import main
from smoothq.recipe.recipe import Preset

pytestmark = pytest.mark.usefixtures("short_text")

ROOT = Path(__file__).parents[2]
QUICK = ("--samples", "4", "--sequence-length", "32")


def accuracy() -> ModuleType:
    """A fresh copy of the script, as a module."""
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "scripts" / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accuracy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_runs_are_measured_once_stored_and_tabled(
    float_checkpoint, tmp_path, monkeypatch, run
) -> None:
    script = accuracy()
    start, commands = subprocess.run, list[list[str]]()

    def in_this_process(command: list[str], **options: object) -> object:
        """The first command in a process as the script has it, the others as `run` runs them."""
        commands.append(command)
        if len(commands) == 1:
            return start(command, **options)
        assert command[:3] == [sys.executable, "-m", "smoothq"]
        code, out, log = run(*command[3:])
        assert code == 0, log
        return SimpleNamespace(stdout=out.splitlines()[-1])  # the script's own lines come before

    monkeypatch.setattr(subprocess, "run", in_this_process)
    rows = [
        script.Row("eight bits", ("--w8a8", *QUICK)),
        script.Row("two draws", ("--w4a8", "--group-size", "16", "--effort", "fast", *QUICK), 2),
    ]
    monkeypatch.setattr(script, "ROWS", rows)
    monkeypatch.setattr(script, "DECODED_TOKENS", 8)
    page, results = tmp_path / "accuracy.md", tmp_path / "results.json"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    texts = ("--text", "builtin", "--calibration", "builtin", "--evaluation-length", "32")
    files = ("--results", str(results), "--page", str(page), "--windows", "2")
    arguments = ["", "--model", str(float_checkpoint("llama")), *texts, *files, "--table"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()

    runs = json.loads(results.read_text())
    assert [(run["row"], run["seed"]) for run in runs] == [
        *[("float", 0), ("eight bits", 0), ("two draws", 0), ("two draws", 1)]
    ]
    assert all(run["perplexity"] > 1 and run["second_perplexity"] > 1 for run in runs)
    assert runs[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert 0 < runs[1]["divergence"] < runs[2]["divergence"]
    assert all(run["decode_divergence"] < 1e-2 for run in runs)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    low, high = sorted(run["perplexity"] for run in runs[2:])
    assert f"({low:.2f} … {high:.2f})" in text
    assert f"| {runs[1]['bits']['weight']:.2f} |" in text

    assert [command[-1] == "--dry-run" for command in commands] == [True, False] * 3
    monkeypatch.setattr(sys, "argv", arguments)
    measured: list[str] = []
    monkeypatch.setattr(script.Bench, "measure", lambda bench, path: measured.append(path))
    script.main()
    assert not measured
    assert json.loads(results.read_text()) == runs


def test_the_perplexity_is_the_one_that_eval_prints(float_checkpoint, monkeypatch, capsys) -> None:
    script, model = accuracy(), str(float_checkpoint("llama"))
    monkeypatch.setattr(script, "DECODED_TOKENS", 8)
    shape = {"windows": 3, "evaluation_length": 32}
    bench = script.Bench(argparse.Namespace(model=model, text="builtin", **shape))
    flags = ("--text", "builtin", "--windows", "3", "--sequence-length", "32", "--json")
    monkeypatch.setattr(sys, "argv", ["smoothq", "eval", model, *flags])
    with pytest.raises(SystemExit, match="0"):
        main()
    (printed,) = json.loads(capsys.readouterr().out)["texts"]
    assert bench.measure(model)["perplexity"] == round(printed["perplexity"], 4)


def test_a_run_counts_although_its_recipe_lacks_fields_that_came_later() -> None:
    script, recipe = accuracy(), preset("w4a8").model_dump(mode="json")
    known = {"row": "a", "seed": 0, "setting": {}, "recipe": recipe}
    older = {name: value for name, value in recipe.items() if name != "kv_cache"}
    assert script.is_of(known | {"recipe": older, "perplexity": 1.0}, known)
    assert not script.is_of(known | {"recipe": older | {"seed": 1}}, known)
    assert not script.is_of(known | {"recipe": older | {"gone": 1}}, known)
    assert not script.is_of(known | {"seed": 1}, known)


def test_the_page_holds_the_table_of_the_stored_results() -> None:
    script = accuracy()
    text = script.PAGE.read_text()
    stored = text.split(script.BEGIN)[1].split(script.END)[0].strip()
    assert stored == script.table(script.Results(script.RESULTS))


def test_every_row_is_a_method_or_a_recipe_of_the_examples() -> None:
    for row in accuracy().ROWS:
        if row.flags[0] == "--recipe":
            assert (ROOT / row.flags[1]).parent.name == "examples"
            assert (ROOT / row.flags[1]).is_file()
        else:
            assert row.flags[0].removeprefix("--") in get_args(Preset)
