"""The process around us: what a caller set does not change a result, and is as it was afterwards."""

import ast
import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import smoothq
from smoothq import Recipe, quantize
from smoothq.checkpoint.stream import empty_model
from smoothq.memory import busy_heap, steady_heap
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import RECIPES

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
ROOT = Path(smoothq.__file__).parent
SOME = ["w8a8", "w4a8", "w4a4-rrs", "w4a4-rrs-live", "w4a16-asymmetric", "w8a8-kv8-int8"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def made(
    recipe: Recipe, data: torch.Tensor, tokenizer: PreTrainedTokenizerFast, name: str = "llama"
) -> PreTrainedModel:
    return quantize(tiny_model(name, torch.float32), recipe, tokenizer, data)


@pytest.fixture(scope="module")
def checkpoint(float_checkpoint, tmp_path_factory, data) -> Callable[[str], Path]:
    """The directory of a quantized model by the name of its recipe, made once."""
    known: dict[str, Path] = {}

    def of(recipe: str) -> Path:
        if recipe not in known:
            known[recipe] = tmp_path_factory.mktemp("process") / recipe
            quantize(float_checkpoint("llama"), RECIPES[recipe], data=data, output=known[recipe])
        return known[recipe]

    return of


class TestSurroundings:
    @pytest.mark.parametrize("surroundings", SURROUNDINGS)
    @pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4-rrs", "w4a16"])
    def test_the_stored_bytes_are_the_same(
        self, checkpoint, float_checkpoint, tmp_path, data, recipe, surroundings
    ) -> None:
        with SURROUNDINGS[surroundings]():
            source = float_checkpoint("llama")
            quantize(source, RECIPES[recipe], data=data, output=tmp_path / "out")
        expected = load_file(checkpoint(recipe) / "model.safetensors")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name

    @pytest.mark.parametrize("recipe", SOME)
    @pytest.mark.parametrize("surroundings", ["bfloat16 by default", "float64 by default"])
    def test_logits_are_the_same(self, checkpoint, recipe, surroundings) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(recipe))
        before = logits(model)
        with SURROUNDINGS[surroundings]():
            assert torch.equal(logits(model), before)
