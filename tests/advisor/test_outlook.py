"""What `smoothq plan` says of a recipe: who runs it, and what it costs to run."""

import pytest
import torch

from smoothq import preset
from smoothq.advisor.chips import A100
from smoothq.advisor.costs import Cost, PlanAdvice, advise
from smoothq.plan.resolve import make_plan
from tests.conftest import RECIPES
from tests.tiny_models import tiny_model


def ahead_of(name: str, recipe: str) -> PlanAdvice:
    model = tiny_model(name, torch.float32)
    return advise(model, make_plan(model, RECIPES[recipe]))


def cost(ahead: PlanAdvice, name: str) -> Cost:
    (found,) = (each for each in ahead.costs if each.name.startswith(name))
    return found


def test_a_decoded_token_reads_all_but_an_untied_embedding() -> None:
    tied, untied = ahead_of("llama", "w8a8-rtn"), ahead_of("llama-untied", "w8a8-rtn")
    assert cost(tied, "float").read == cost(tied, "float").nbytes
    model = tiny_model("llama-untied", torch.float32)
    embedding = model.get_input_embeddings().weight.nbytes
    for name in ("float", "as asked"):
        assert cost(untied, name).read == cost(untied, name).nbytes - embedding


def test_of_experts_only_those_that_a_token_is_sent_to_are_read() -> None:
    ahead, model = ahead_of("mixtral", "w8a8-rtn"), tiny_model("mixtral", torch.float32)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    whole = cost(ahead, "float")
    embedding = model.get_input_embeddings().weight.nbytes
    assert whole.read == whole.nbytes - experts // 2 - embedding


def test_bounds_follow_from_the_bytes_and_the_type_of_the_products() -> None:
    ahead = ahead_of("llama", "w4a16")
    floats, asked, integers = (cost(ahead, name) for name in ("float", "as asked", "w8a8"))
    assert asked.decode[A100.name] == pytest.approx(A100.bandwidth / asked.read)
    assert asked.products == floats.products != integers.products
    assert asked.prompt == floats.prompt
    assert integers.prompt[A100.name] == pytest.approx(floats.prompt[A100.name] / 2)
    assert all(value > 0 for each in ahead.costs for value in each.here)


def test_a_preset_that_was_asked_for_stands_once() -> None:
    model = tiny_model("llama", torch.float32)
    ahead = advise(model, make_plan(model, preset("w8a8")))
    assert [each.name for each in ahead.costs] == ["float", "w8a8, as asked"]
    assert set(ahead.refused) == {"w4a16", "w4a8", "w4a4"}


@pytest.mark.parametrize(
    ("name", "feature", "reason"),
    [
        ("gpt_oss", "kv_cache, attention", "sinks"),
        ("gemma2", "kv_cache, attention", "caps its scores"),
        ("mixtral", "runtime_smoothing.scope=live", "tokens of all sequences"),
    ],
)
def test_what_a_family_cannot_do_is_said_with_the_reason(name, feature, reason) -> None:
    assert reason in ahead_of(name, "w8a8-rtn").refused[feature]


def test_every_kind_of_linear_is_listed_with_its_operators() -> None:
    processor, a100, *_, others, plugin = ahead_of("llama", "w4a4").runners
    assert processor.runs
    assert "qkv" in processor.how
    assert "down" in processor.how
    assert "quantize_token_groups" in a100.how
    assert not others.runs
    assert "rotation.down: false" in others.how
    assert plugin.runs
    assert not ahead_of("llama", "w4a4-rrs-live").runners[-1].runs
    assert ahead_of("llama", "w8a8").runners[-2].runs
