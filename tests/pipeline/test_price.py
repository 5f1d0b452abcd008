"""The estimate of what a quantization takes: how it grows, and what it comes to where measured."""

import json
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import needs
import pytest
import torch
from make_random_model import Shapes, config_of
from models import skeleton
from torch import Tensor

from smoothq import Recipe, preset, quantize
from smoothq.checkpoint import source
from smoothq.pipeline import estimate
from smoothq.pipeline.estimate import block_operations, estimate_resources
from smoothq.plan.plan import Plan
from smoothq.plan.resolve import make_plan
from smoothq.report.results import duration_text
from smoothq.runtime import mapped
from smoothq.runtime.mapped import mapped_tensor
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

DATA = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def planned(recipe: Recipe) -> Plan:
    return make_plan(tiny_model("llama"), recipe)


def operations(recipe: Recipe) -> float:
    plan = planned(recipe)
    return sum(block_operations(block, plan) for block in plan.blocks)


def test_a_step_of_tuning_is_three_forwards_of_a_micro_batch() -> None:
    recipe = RECIPES["w4a8"]
    one, two, five = (operations(recipe.edit(tuning={"steps": n})) for n in (1, 2, 5))
    assert five - two == pytest.approx(3 * (two - one))
    elements = 3 * sum(
        spec.out_features * spec.in_features
        for site in planned(recipe).blocks[0].sites
        for spec in site.modules.values()
    )
    attention = 3 * 4 * recipe.calibration.sequence_length * 64  # as wide as the heads
    assert two - one == pytest.approx(3 * 2048 * (2 * elements + attention))


def test_all_but_gptqs_own_work_grows_with_the_text() -> None:
    recipe = RECIPES["w4a8"].edit(tuning=None)
    few, many = (operations(recipe.edit(calibration__samples=n)) for n in (10, 20))
    assert few < many < 2 * few
    nearest = recipe.edit(weights__rounding="rtn")
    few, many = (operations(nearest.edit(calibration__samples=n)) for n in (10, 20))
    assert many == pytest.approx(2 * few)


ROWS = json.loads(needs.RESULTS.read_text())["rows"]
LIBRARIES = 300_000_000  # bytes that a process takes before it has read a model


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["how"] == "measured"])
def test_the_estimate_is_what_a_run_was_measured_to_take(name: str, monkeypatch) -> None:
    shapes, recipe = name.split(": ")
    model = skeleton(config_of(Shapes(shapes), None), torch.bfloat16)
    plan = make_plan(model, needs.RECIPES[recipe])
    monkeypatch.setattr(estimate, "peak_memory", lambda: LIBRARIES)
    estimated = estimate_resources(plan)
    assert plan.total_bytes == ROWS[name]["after"]
    assert ROWS[name]["disk"] == pytest.approx(estimated.disk, rel=0.05)
    assert ROWS[name]["memory"] == pytest.approx(estimated.memory, rel=0.15)


@pytest.mark.parametrize("recipe", ["w8a8-rtn", "w8a8", "w4a16"])
def test_experts_in_files_take_the_disk_that_is_estimated(recipe, monkeypatch, tmp_path) -> None:
    changed = RECIPES[recipe].edit(tuning=None, gptq__least_tokens=1)
    model = tiny_model("mixtral", torch.float32)
    alone = estimate_resources(make_plan(model, changed))
    monkeypatch.setattr(source, "STACK_BYTES", 1)
    beside = estimate_resources(make_plan(model, changed))
    alive, most = Counter[int](), 0

    def counted(shape: Iterable[int], dtype: torch.dtype, directory: Path) -> Tensor:
        nonlocal most
        tensor = mapped_tensor(shape, dtype, directory)
        alive[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        pages = mapped._maps[tensor.untyped_storage().data_ptr()]
        weakref.finalize(pages, alive.pop, tensor.untyped_storage().data_ptr())
        most = max(most, alive.total())
        return tensor

    monkeypatch.setattr(source, "mapped_tensor", counted)
    monkeypatch.setattr(mapped, "mapped_tensor", counted)
    model.save_pretrained(tmp_path / "float")
    quantize(tmp_path / "float", changed, data=DATA, output=tmp_path / "out", check=False)
    assert most <= beside.disk - alone.disk <= 1.2 * most


def test_experts_in_files_are_no_memory(monkeypatch) -> None:
    recipe, model = RECIPES["w8a8-rtn"], tiny_model("mixtral", torch.float32)
    plan = make_plan(model, recipe)
    sizes = {name: spec.nbytes for name, spec in plan.wiring.tensors.items() if ".experts." in name}
    stacks = sum(size for name, size in sizes.items() if ".layers.0." in name)
    in_memory = estimate_resources(plan).memory
    monkeypatch.setattr(source, "STACK_BYTES", 1)
    monkeypatch.setattr(estimate, "RESIDENT_BYTES", 0)
    largest = max(sizes.values()) // model.config.num_local_experts
    assert in_memory - estimate_resources(plan).memory == pytest.approx(stacks - largest, rel=0.1)


def test_a_recipe_without_calibration_takes_none() -> None:
    assert operations(preset("w8a8", "rtn")) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (80, "80 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_read_as_one_says_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
