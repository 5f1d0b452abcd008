"""The runners of a plan: GPUs that are not here are named with what they multiply."""

from typing import get_args

import pytest

from smoothq import preset
from smoothq.advisor.runners import list_runners
from smoothq.plan.resolve import make_plan
from smoothq.recipe.recipe import Preset
from tests.tiny_models import wide_llama


def runners_of(name: str) -> dict[str, str]:
    """What the runners of a preset's plan do, by name."""
    model = wide_llama()
    return {found.name: found.how for found in list_runners(model, make_plan(model, preset(name)))}


@pytest.mark.parametrize("name", get_args(Preset))
def test_every_preset_has_its_operators_listed_for_every_device(name: str) -> None:
    runners = runners_of(name)
    for device, architecture in (("A100 SXM", "sm_80"), ("H100 SXM", "sm_90")):
        assert "→" in runners[f"{device} ({architecture})"]


@pytest.mark.parametrize("name", ["fp8", "fp8-block"])
def test_codes_are_multiplied_where_a_chip_multiplies_them(name: str) -> None:
    runners = runners_of(name)
    assert "fp8_gemm" in runners["H100 SXM (sm_90)"]
    assert "fp_gemm (emulated)" in runners["A100 SXM (sm_80)"]
