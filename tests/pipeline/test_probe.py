"""What a probe measures while a model is quantized, and how a run is stopped by it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smoothq import (
    BlockDone,
    Probe,
    perplexity,
    quantize,
)
from smoothq.errors import CalibrationError, StoppedError
from tests.conftest import RECIPES
from tests.tiny_models import tiny_model

NAMES = ["llama", "llama-untied", "gemma2", "opt", "mixtral"]


def tokens(data) -> torch.Tensor:
    return data[:2, :20]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_it_starts_at_the_float_model_and_ends_at_the_quantized_one(name, recipe, data) -> None:
    model = tiny_model(name, torch.float32)
    seen: list[BlockDone] = []
    run = {"data": data, "probe": Probe(data), "check": False}
    made = quantize(model, RECIPES[recipe], on_block=seen.append, **run)
    assert [done.block for done in seen] == [0, 1, 2]
    text = data.flatten().unsqueeze(0)
    wanted = perplexity(model, text, data.shape[1]).perplexity
    assert seen[0].float_perplexity == pytest.approx(wanted, rel=1e-4)
    end = perplexity(made, text, data.shape[1]).perplexity
    assert seen[-1].perplexity == pytest.approx(end, rel=1e-2)


def test_between_it_is_the_model_with_the_blocks_so_far(data) -> None:
    model = tiny_model("llama", torch.float32)
    seen: list[BlockDone] = []
    recipe = RECIPES["w8a8-rtn"]
    run = {"data": data, "probe": Probe(data), "check": False}
    made = quantize(model, recipe, on_block=seen.append, **run)
    mixed = tiny_model("llama", torch.float32)
    mixed.model.layers[0] = made.model.layers[0]
    wanted = perplexity(mixed, data.flatten().unsqueeze(0), data.shape[1]).perplexity
    assert seen[0].perplexity == pytest.approx(wanted, rel=1e-5)


def test_it_measures_every_few_blocks_and_at_the_end(data) -> None:
    seen: list[BlockDone] = []
    probe = Probe(data, every=2)
    model = tiny_model("llama", torch.float32)
    run = {"data": data, "probe": probe, "check": False}
    quantize(model, RECIPES["w8a8-rtn"], on_block=seen.append, **run)
    assert [done.perplexity is not None for done in seen] == [False, True, True]


def test_without_a_probe_blocks_are_told_alone(data) -> None:
    seen: list[BlockDone] = []
    run = {"data": data, "check": False}
    quantize(tiny_model("llama", torch.float32), RECIPES["w8a8"], on_block=seen.append, **run)
    assert seen == [BlockDone(block, 3) for block in range(3)]


def test_what_the_callback_raises_stops_the_run_which_can_be_gone_on_with(data, tmp_path) -> None:
    model, out = tiny_model("llama", torch.float32), tmp_path / "out"
    figures: dict[int, float | None] = {}

    def stopping(done: BlockDone) -> None:
        figures[done.block] = done.perplexity
        if done.block == 1 and len(figures) == 2:
            raise KeyboardInterrupt

    recipe, probe = RECIPES["w8a8"], Probe(data)
    run = {"data": data, "output": out, "probe": probe}
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe, on_block=stopping, **run)
    assert not out.exists()
    later: list[BlockDone] = []
    quantize(model, recipe, on_block=later.append, resume=True, **run)
    assert [done.block for done in later] == [2]
    whole: list[BlockDone] = []
    quantize(model, recipe, data=data, on_block=whole.append, probe=probe, check=False)
    assert later[0].perplexity == whole[2].perplexity
    assert figures[1] == whole[1].perplexity


def test_a_run_begun_without_a_probe_cannot_get_one(data, tmp_path) -> None:
    model, out = tiny_model("llama", torch.float32), tmp_path / "out"

    def stop(done: BlockDone) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, RECIPES["w8a8"], data=data, output=out, on_block=stop)
    with pytest.raises(StoppedError, match="without a probe"):
        quantize(model, RECIPES["w8a8"], data=data, output=out, probe=Probe(data))
    quantize(model, RECIPES["w8a8"], data=data, output=out, resume=True)


@pytest.mark.parametrize(("shape", "every"), [((3,), 1), ((0, 4), 1), ((2, 1), 1), ((2, 4), 0)])
def test_a_probe_of_nothing_is_refused(shape, every) -> None:
    with pytest.raises(CalibrationError):
        Probe(torch.zeros(shape, dtype=torch.int64), every)


def test_the_result_is_the_same_with_and_without(data, tmp_path) -> None:
    model = tiny_model("llama", torch.float32)
    for name, probe in (("with", Probe(data)), ("without", None)):
        quantize(
            model, RECIPES["w4a16"], data=data, output=tmp_path / name, probe=probe, check=False
        )
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("with", "without"))
    assert first == second
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "smoothq"
    AutoModelForCausalLM.from_pretrained(tmp_path / "with")
