"""Linears that the field leaves in float stay so, unless an override names them."""

from functools import cache

import pytest
from transformers import AutoConfig, PreTrainedModel

from smoothq import preset
from smoothq.architectures.sensitive import float_by_default
from smoothq.checkpoint.skeleton import empty_model
from smoothq.plan.plan import Plan
from smoothq.plan.resolve import make_plan
from smoothq.recipe.recipe import Recipe

RECIPE = preset("w8a8", method="rtn")


@cache
def model() -> PreTrainedModel:
    """Qwen3-Next's wiring: gated delta layers, experts, a gated shared expert."""
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4, num_experts=4, hidden_size=64)
    return empty_model(config)


def quantized(plan: Plan) -> set[str]:
    return {name for name, *_ in plan.linears()}


def test_a_pattern_counts_where_it_matches() -> None:
    names = ["model.layers.0.mlp.shared_expert_gate", "model.layers.0.mlp.shared_expert.up_proj"]
    assert list(float_by_default(names)) == ["*.shared_expert_gate"]
    assert not float_by_default(["model.layers.0.mlp.gate_proj"])


@pytest.mark.slow
class TestPlan:
    def test_they_stay_in_float_with_a_note(self) -> None:
        plan = make_plan(model(), RECIPE)
        assert not any("in_proj_ba" in name for name in quantized(plan))
        assert any("in_proj_ba stays in float" in note for note in plan.notes)
        assert "*.linear_attn.in_proj_ba" in plan.recipe.keep

    def test_a_resolved_recipe_resolves_to_itself(self) -> None:
        once = make_plan(model(), RECIPE).recipe
        assert make_plan(model(), once).recipe == once

    def test_an_override_quantizes_them(self) -> None:
        asked: Recipe = RECIPE.edit(
            overrides=[{"match": "*.linear_attn.in_proj_ba", "weights": {"bits": 8}}]
        )
        plan = make_plan(model(), asked)
        assert any("in_proj_ba" in name for name in quantized(plan))
