"""No sequence is longer than a model's positions, and a zero anywhere ends nothing."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from smoothq import perplexity, preset, quantize
from smoothq.architectures.positions import positions_of, within_positions
from smoothq.checkpoint.open import open_source
from smoothq.inspection.outliers import inspect_model
from smoothq.inspection.sensitivity import measure
from smoothq.pipeline.block_tuning import relative_error
from smoothq.pipeline.monitor import Probe
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

LONG = torch.randint(VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gpt_neox"])
def test_positions_are_those_that_the_model_runs_with(name) -> None:
    model = tiny_model(name, torch.float32)
    assert positions_of(model) == 64
    model(LONG[:, :64])


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_table_counts_for_more_than_what_the_config_says(name) -> None:
    model = tiny_model(name, torch.float32)
    model.config.max_position_embeddings = 4096
    assert positions_of(model) == 64
    with pytest.raises(IndexError):
        model(LONG[:, :65])


def test_attention_by_distance_has_no_limit() -> None:
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=VOCABULARY)
    assert positions_of(AutoModelForCausalLM.from_config(config)) is None


def test_shortening_says_so_and_nothing_else_does(caplog) -> None:
    model = tiny_model("opt", torch.float32)
    assert within_positions(model, 64, "windows") == 64
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert within_positions(model, 2048, "windows") == 64
    assert caplog.messages == ["windows of 2048 tokens are shortened to the model's 64 positions"]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_all_that_reads_text_shortens_it(name, tokenizer) -> None:
    model = tiny_model(name, torch.float32)
    short = {"calibration__samples": 2, "calibration__sequence_length": 128}
    quantize(model, RECIPES["w8a8"].edit(**short), tokenizer=tokenizer)
    quantize(model, RECIPES["w8a8"], data=LONG, probe=Probe(LONG))
    assert perplexity(model, LONG[:1], 100).sequence_length == 64
    assert inspect_model(open_source(model), LONG, "w8a8").tokens.shape == (2, 64)
    assert measure(open_source(model), preset("w8a8", "rtn"), LONG).tokens == 128


def padded(name: str = "llama") -> torch.nn.Module:
    """A model whose token 2 is a row of zeros, as a padding row is."""
    model = tiny_model(name, torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = 0
    return model


@pytest.mark.parametrize("value", [0, 1e-30])
def test_tokens_without_an_output_add_nothing_to_the_loss(value) -> None:
    wanted = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    output = (wanted + 0.1).requires_grad_()
    usual = relative_error(output, wanted)[None]
    zeros = torch.cat([wanted, torch.full_like(wanted, value)])
    moved = torch.cat([output, torch.full_like(wanted, 0.3)])
    error = relative_error(moved, zeros)
    assert error.item() == pytest.approx(usual.item() / 2)
    (gradient,) = torch.autograd.grad(error, output)
    assert gradient.isfinite().all()
    nothing = relative_error(output, torch.zeros_like(wanted))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, output)[0].any()


@pytest.mark.parametrize(
    "recipe", ["w4a8", pytest.param("w4a4", marks=pytest.mark.slow), "w8a8", "w8a8-static"]
)
def test_a_hidden_state_of_zero_ends_nothing(recipe) -> None:
    data = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    data[:, :9] = 2
    edits = {} if RECIPES[recipe].smoothing is None else {"smoothing__alpha": "auto"}
    model = padded()
    found = quantize(model, RECIPES[recipe].edit(**edits), data=data)
    assert found(data).logits.isfinite().all()
    inspected = inspect_model(open_source(model), torch.full((1, 8), 2), "w4a4")
    for site in inspected.sites:
        assert all(
            torch.tensor([p.error, p.kurtosis]).isfinite().all() for p in site.profiles.values()
        )


def test_a_model_of_zeros_is_quantized() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 32}
    config = AutoConfig.for_model("llama", **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config).float()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    data = LONG[:, :16]
    for name in ("w8a8", "w4a8"):
        assert quantize(model, RECIPES[name], data=data)(data).logits.isfinite().all()
