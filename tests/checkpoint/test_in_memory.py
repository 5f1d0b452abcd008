"""A model as it may arrive in memory: taken out of its wrappers, or refused by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from smoothq import preset, quantize
from smoothq.errors import CheckpointError, SmoothqError, UnsupportedModelError
from tests.tiny_models import tiny_model

RTN = preset("w8a8", "rtn")
IDS = torch.arange(2, 20)[None]


def model(name: str = "llama") -> PreTrainedModel:
    return tiny_model(name, torch.float32)


def adapted(base: PreTrainedModel) -> Any:
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))


def compiled_blocks() -> PreTrainedModel:
    made = model()
    for index, block in enumerate(made.model.layers):
        made.model.layers[index] = torch.compile(block)
    return made


TAKEN: dict[str, Callable[[Path], Any]] = {
    "compiled": lambda folder: torch.compile(model()),
    "compiled blocks": lambda folder: compiled_blocks(),
    "data parallel": lambda folder: nn.DataParallel(model()),
    "both": lambda folder: torch.compile(nn.DataParallel(model())),
    "offloaded to memory": lambda folder: cpu_offload(model()),
    "offloaded to disk": lambda folder: disk_offload(model(), str(folder / "offload")),
    "merged": lambda folder: adapted(model()).merge_and_unload(),
}


@torch.no_grad()
@pytest.mark.parametrize("form", TAKEN)
def test_what_wraps_a_model_changes_nothing(form, tmp_path) -> None:
    made = TAKEN[form](tmp_path)
    parameters = {name: id(value) for name, value in made.named_parameters()}
    found = quantize(made, RTN)
    assert torch.equal(found(IDS).logits, quantize(model(), RTN)(IDS).logits)
    assert {name: id(value) for name, value in made.named_parameters()} == parameters


def test_tied_weights_that_are_offloaded_stay_tied() -> None:
    found = quantize(cpu_offload(model("opt")), RTN)
    assert torch.equal(found(IDS).logits, quantize(model("opt"), RTN)(IDS).logits)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "adapter": (lambda folder: adapted(model()), "give model.merge_and_unload()"),
    "compiled adapter": (lambda folder: torch.compile(adapted(model())), "merge_and_unload()"),
    "its base": (lambda folder: adapted(model()).get_base_model(), "q_proj' holds an adapter"),
    "prompt": (
        lambda folder: get_peft_model(
            model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "learned prompt",
    ),
    "on meta": (lambda folder: model().to("meta"), "give the folder's path"),
    "quantized by torch": (
        lambda folder: torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}),
        "another tool quantized",
    ),
    "integers": (lambda folder: with_integers(), "no float tensor"),
    "quantized by us": (lambda folder: quantize(model(), RTN), "already quantized"),
    "holder": (lambda folder: Holder(), "Holder is no model: give its .model"),
    "module": (lambda folder: nn.Linear(2, 2), "Linear is no model: give a folder"),
    "none": (lambda folder: None, "NoneType is no model"),
    "bytes": (lambda folder: os.fsencode(folder), "bytes is no model"),
    "list": (lambda folder: [str(folder)], "list is no model"),
}


def with_integers() -> PreTrainedModel:
    made = model()
    linear = made.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return made


@pytest.mark.parametrize("case", REFUSED)
def test_all_else_is_refused_in_a_line(case, tmp_path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError) as error:
        quantize(make(tmp_path), RTN, output=tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "no\0name", "a b", "\n"])
def test_a_name_that_no_folder_can_have_is_one_error(name, tmp_path) -> None:
    with pytest.raises(SmoothqError) as error:
        quantize(name, RTN, output=tmp_path / "out")
    assert isinstance(error.value, CheckpointError)
