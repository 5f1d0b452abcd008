"""How far two models' predictions are apart, and a model's from its own token by token."""

import pytest
import torch

from smoothq import quantize
from smoothq.errors import CalibrationError
from smoothq.evaluation.divergence import agreement, prefill_and_decode
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

WINDOWS = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))


def test_a_model_agrees_with_itself() -> None:
    model = tiny_model("llama", torch.float32)
    found = agreement(model, model, WINDOWS)
    assert found.divergence == pytest.approx(0, abs=1e-7)
    assert (found.top1, found.tokens) == (1.0, 60)


@torch.no_grad()
def test_divergence_and_top1_are_means_over_all_tokens() -> None:
    model, reference = tiny_model("llama", torch.float32), tiny_model("qwen3", torch.float32)
    found = agreement(model, reference, WINDOWS)
    q, p = (m(input_ids=WINDOWS).logits.double().log_softmax(-1) for m in (model, reference))
    assert found.divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.divergence > 0


def test_a_causal_recipe_decodes_as_it_prefills_and_a_live_one_does_not(
    float_checkpoint, data
) -> None:
    causal, live = (
        prefill_and_decode(quantize(float_checkpoint("llama"), recipe, data=data), WINDOWS[:1])
        for recipe in (RECIPES["w4a8"], RECIPES["w4a4-rrs-live"])
    )
    assert causal.divergence < 1e-3
    assert causal.top1 == 1.0
    assert live.divergence > 10 * causal.divergence


@pytest.mark.parametrize("shape", [(20,), (0, 20), (1, 2, 20)], ids=str)
def test_windows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny_model("llama", torch.float32)
    with pytest.raises(CalibrationError, match=r"windows must be \(windows, length\)"):
        agreement(model, model, torch.zeros(shape, dtype=torch.long))
