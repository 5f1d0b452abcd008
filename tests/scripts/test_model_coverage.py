"""The coverage of model types: what counts as right, and two types from start to end."""

import json
import os
import subprocess
import sys

import pytest
import torch

from scripts import model_coverage as coverage


def recipes(**verdicts: str) -> dict[str, dict[str, object]]:
    """A record's recipes with some verdicts, each for a reason of the same name."""
    return {name: {"verdict": it, "reason": f"it is {it}"} for name, it in verdicts.items()}


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (("ok", "ok"), "ok"),
        (("ok", "partly"), "partly"),
        (("ok", "refused"), "partly"),
        (("refused", "refused"), "refused"),
        (("partly", "wrong"), "wrong"),
    ],
)
def test_a_type_is_what_its_recipes_are(verdicts, whole) -> None:
    record = {"recipes": recipes(a=verdicts[0], b=verdicts[1])}
    assert coverage.verdict(record) == whole
    assert (coverage.reason(record) == "") == (whole == "ok")


def test_a_process_that_ends_is_a_crash_where_it_was() -> None:
    record = {"recipes": recipes(a="ok"), "stage": "b", "reason": "out of memory"}
    assert coverage.verdict(record) == "crash"
    assert coverage.reason(record) == "b: out of memory"
    assert coverage.verdict({"recipes": {}, "stage": "build"}) == "not built"


def test_recipes_that_fail_alike_share_a_reason() -> None:
    record = {"recipes": recipes(a="refused", b="ok", c="refused")}
    assert coverage.reason(record) == "a and c: it is refused"


def test_an_error_is_held_to_plain_rounding() -> None:
    plain = coverage.Deviation(0.010, 0.010, 0.012)
    assert coverage.is_as_good(coverage.Deviation(0.012, 0.011, 0.05), plain)
    assert not coverage.is_as_good(coverage.Deviation(0.05, 0.05, 0.05), plain)
    # A router that flips moves a few tokens far.
    assert coverage.is_as_good(coverage.Deviation(0.03, 0.011, 0.05), plain)
    assert not coverage.is_as_good(coverage.Deviation(0.06, 0.011, 0.05), plain)
    assert coverage.is_as_good(coverage.Deviation(0.06, 0.011, 0.015), plain)
    assert not coverage.is_as_good(coverage.Deviation(0.2, 0.011, 0.015), plain)


def test_a_deviation_tells_a_few_tokens_from_all() -> None:
    before = torch.ones(2, 10, 4)
    now = before.clone()
    now[0, 0] += 1
    found = coverage.deviation(now, before)
    assert found.whole == pytest.approx((1 / 20) ** 0.5)
    assert found.median == found.most == 0


def test_plain_rounding_touches_the_linears_of_the_blocks_alone() -> None:
    model = coverage.small_model("llama", "causal")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    touched = coverage.round_plainly(model, (8, 16))
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {name for name in before if ".layers." in name and "_proj" in name}
    assert touched == sum(before[name].numel() for name in changed)


def test_lists_hold_decoders_and_samples_are_fixed() -> None:
    types = coverage.types_of("causal")
    assert {"llama", "mamba", "deepseek_v3"} <= set(types)
    assert "bert" not in types
    assert types == sorted(types)
    assert "llava" in coverage.types_of("image-text")


def test_the_manual_has_the_table_of_the_results() -> None:
    text = coverage.PAGE.read_text("utf-8")
    assert coverage.written(text) == text


@pytest.mark.slow
def test_two_types_are_examined_and_not_a_second_time(tmp_path) -> None:
    results = tmp_path / "results.json"
    options = ["--types", "llama,lfm2", "--list", "causal", "--output", str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, coverage.__file__, *options]

    def lines() -> list[str]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    first = lines()
    assert sorted(line.split()[2] for line in first[:2]) == ["lfm2:", "llama:"]
    assert first[-1] == "causal: 2 of 2 are ok"
    rows = json.loads(results.read_text())["lists"]["causal"]
    for row in rows.values():
        assert set(row["recipes"]) == set(coverage.RECIPES)
        assert all(found["codes"] >= 0.97 for found in row["recipes"].values())
    assert rows["llama"]["claims"]["QuaRot"] == "offline"
    assert lines() == first[-1:]
    assert "| llama | ok | norms, up→down, v→o | offline | yes |" in coverage.table(
        json.loads(results.read_text())
    )
