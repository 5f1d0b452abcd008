"""A plan of a model of real size takes seconds and little memory: it reads no weight."""

import pytest

from scripts import plan_sizes


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma4", "qwen3_vl"])
def test_a_plan_of_the_default_config_fits_the_limits(model_type) -> None:
    taken = plan_sizes.plan(model_type, "--w8a8")
    assert taken.fits, taken
