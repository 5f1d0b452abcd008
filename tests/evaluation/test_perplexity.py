"""Perplexity against a plain float64 computation, its protocol and its errors."""

import math
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smoothq.errors import CalibrationError, NumericsError
from smoothq.evaluation.perplexity import Perplexity, perplexity

VOCABULARY = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokens() -> torch.LongTensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, 50), generator=generator)


@torch.no_grad()
def plain_perplexity(model: LlamaForCausalLM, windows: list[torch.Tensor]) -> float:
    """The definition, token by token in float64."""
    losses = []
    for window in windows:
        logits = model.eval()(window[None]).logits[0].double()
        log_probabilities = logits - logits.exp().sum(dim=-1, keepdim=True).log()
        losses += [-log_probabilities[t, window[t + 1]].item() for t in range(len(window) - 1)]
    return math.exp(math.fsum(losses) / len(losses))


def test_equals_the_definition_over_whole_windows(model, tokens) -> None:
    result = perplexity(model, tokens, sequence_length=12)
    expected = plain_perplexity(model, list(tokens[0, :48].view(4, 12)))
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert (result.tokens, result.windows, result.sequence_length) == (44, 4, 12)
    assert isinstance(result, Perplexity)
    assert result.seconds > 0


def test_only_so_many_windows_from_the_start(model, tokens) -> None:
    result = perplexity(model, tokens, sequence_length=12, windows=3)
    expected = plain_perplexity(model, list(tokens[0, :36].view(3, 12)))
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert (result.tokens, result.windows) == (33, 3)
    assert perplexity(model, tokens, sequence_length=12, windows=99).windows == 4


def test_text_shorter_than_a_window_is_used_as_it_is(model, tokens) -> None:
    result = perplexity(model, tokens, sequence_length=2048)
    assert result.perplexity == pytest.approx(plain_perplexity(model, [tokens[0]]), rel=1e-6)
    assert (result.tokens, result.windows, result.sequence_length) == (49, 1, 50)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batch_size_changes_nothing(model, tokens, batch_size) -> None:
    one = perplexity(model, tokens, sequence_length=9)
    many = perplexity(model, tokens, sequence_length=9, batch_size=batch_size)
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert (many.tokens, many.windows) == (one.tokens, one.windows)


@pytest.mark.parametrize("rows", [1, 5, 11])
def test_chunks_change_nothing(model, tokens, monkeypatch, rows) -> None:
    whole = perplexity(model, tokens, sequence_length=12)
    monkeypatch.setattr(sys.modules[perplexity.__module__], "_CHUNK_ELEMENTS", rows * VOCABULARY)
    chunked = perplexity(model, tokens, sequence_length=12)
    assert chunked.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_softmax_of_a_half_precision_model_is_float32(model, tokens) -> None:
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    result = perplexity(half, tokens, sequence_length=12)
    expected = plain_perplexity(half, list(tokens[0, :48].view(4, 12)))
    assert result.perplexity == pytest.approx(expected, rel=1e-6)


def test_runs_in_eval_mode_without_cache_or_gradient_and_restores_the_mode(model, tokens) -> None:
    seen = []

    def watch(watched, args, kwargs):
        seen.append((watched.training, torch.is_grad_enabled(), kwargs["use_cache"]))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        for training in (True, False):
            model.train(training)
            perplexity(model, tokens, sequence_length=25)
            assert model.training is training
    finally:
        handle.remove()
    assert set(seen) == {(False, False, False)}


def test_reports_each_window(model, tokens) -> None:
    reports = []
    result = perplexity(
        model,
        tokens,
        sequence_length=12,
        batch_size=3,
        on_window=lambda done, total, so_far: reports.append((done, total, so_far)),
    )
    assert [report[:2] for report in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    first = perplexity(model, tokens, sequence_length=12, windows=1)
    assert reports[0][2] == pytest.approx(first.perplexity, rel=1e-6)
    assert reports[-1][2] == result.perplexity


@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (2, 8), (8,)])
def test_refuses_tokens_that_predict_nothing(model, shape) -> None:
    with pytest.raises(CalibrationError, match="shape"):
        perplexity(model, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    "numbers", [{"sequence_length": 1}, {"windows": 0}, {"batch_size": 0}, {"windows": -1}]
)
def test_refuses_numbers_out_of_range(model, tokens, numbers) -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        perplexity(model, tokens, **numbers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite(model, tokens, value) -> None:
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[0] = value
    broken.train()
    with pytest.raises(NumericsError, match=r"window 0 \(of 4, from 0\) is nan"):
        perplexity(broken, tokens, sequence_length=12)
    assert broken.training


def test_huge_finite_loss_is_infinite_perplexity(model, tokens) -> None:
    wild = LlamaForCausalLM(model.config)
    with torch.no_grad():
        wild.lm_head.weight.mul_(1e5)
    assert perplexity(wild, tokens, sequence_length=12).perplexity == math.inf
