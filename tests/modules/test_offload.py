"""Quantized models that accelerate offloads: the same results, and nothing outside its hooks."""

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothq import keep_packed, kernels, perplexity, quantize
from smoothq.errors import UnsupportedModelError
from smoothq.modules import OnlineRotation, QuantizedLinear
from smoothq.modules.weight_answer import HoldsCodes
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")
TABLES = RECIPES | {
    "w8a8-tables": RECIPES["w8a8-rtn"].edit(embeddings=8),
    "w4a16-tables": RECIPES["w4a16-float-groups"].edit(embeddings=8),
}
CASES = [
    ("w8a8", "llama"),
    ("w8a8-static", "llama"),
    ("w8a8-kv4", "llama"),
    ("w8a8-tables", "llama"),
    ("w8a8-tables", "llama-untied"),
    ("w4a8", "llama-untied"),
    ("w4a8", "mixtral"),
    ("w4a8", "gpt2"),
    ("w4a4-rrs", "llama"),
    ("w4a4-rrs-live", "llama"),
    ("w4a16-asymmetric", "llama"),
    ("w4a16-tables", "llama"),
]
Load = Callable[..., PreTrainedModel]


def device_map(model: nn.Module) -> dict[str, str]:
    """A device for every module without children of a kind; the later ones are on the disk."""
    blocks = next(name for name, each in model.named_modules() if isinstance(each, nn.ModuleList))
    parent, _, leaf = blocks.rpartition(".")
    names = [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
    at = names.index(f"{parent}.{leaf}")
    layers = [f"{blocks}.{name}" for name, _ in model.get_submodule(blocks).named_children()]
    heads = [name for name, _ in model.named_children() if name != parent]
    first, later = [*names[:at], layers[0], *heads], [*layers[1:], *names[at + 1 :]]
    return dict.fromkeys(first, "cpu") | dict.fromkeys(later, "disk")


def loaded_in_parts(load: Load, folder: Path, **options: Any) -> PreTrainedModel:
    return load(device_map=device_map(load()), offload_folder=folder, **options)


WAYS: dict[str, Callable[[Load, Path], PreTrainedModel]] = {
    "cpu_offload": lambda load, _: cpu_offload(load(), CPU, offload_buffers=True),
    "disk_offload": lambda load, to: disk_offload(load(), str(to), CPU, offload_buffers=True),
    "dispatch_model": lambda load, to: dispatch_model(
        model := load(), device_map(model), offload_dir=str(to), offload_buffers=True
    ),
    "from_pretrained": lambda load, to: loaded_in_parts(load, to, offload_buffers=True),
    "from_pretrained, all on the disk": lambda load, to: load(
        device_map={"": "disk"}, offload_folder=to, offload_buffers=True
    ),
    "from_pretrained, parameters alone": loaded_in_parts,
}


@pytest.fixture(scope="module")
def checkpoint(
    float_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    data: Tensor,
) -> Callable[..., Path]:
    """The directory of a quantized model by the names of recipe and wiring, made once."""
    known: dict[tuple[str, str], Path] = {}

    def of(recipe: str, name: str = "llama") -> Path:
        if (recipe, name) not in known:
            directory = known[recipe, name] = tmp_path_factory.mktemp("offload") / recipe
            source = float_checkpoint(name)
            quantize(source, TABLES[recipe], data=data, output=directory, check=False)
        return known[recipe, name]

    return of


@pytest.fixture
def load(checkpoint: Callable[..., Path]) -> Callable[..., Load]:
    """`from_pretrained` of a quantized model, by the names of recipe and wiring."""

    def of(*names: str) -> Load:
        path = checkpoint(*names)
        return lambda **options: AutoModelForCausalLM.from_pretrained(path, **options)

    return of


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def generated(model: PreTrainedModel) -> Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return model.generate(IDS, **options)


def linears(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """The model with other codes and scales, in place."""
    for module in model.modules():
        if isinstance(module, HoldsCodes):
            module.weight_scale.mul_(1.5)
            module.codes.bitwise_and_(0x77)
    for linear in linears(model):
        linear.prepare()
    return model


def left_behind(model: nn.Module) -> list[str]:
    """The attributes of modules that hold values, other than non-persistent buffers."""
    kept = []
    for name, module in model.named_modules():
        running = vars(module).get("_running")
        attributes = vars(module) | module._parameters | module._buffers
        attributes |= {} if running is None else vars(running)
        kept += [
            f"{name}.{key}"
            for key, value in attributes.items()
            if isinstance(value, Tensor) and not value.is_meta
            if key not in module._non_persistent_buffers_set
        ]
    return kept


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_results_are_those_of_the_whole_model(load, tmp_path, recipe, name, way) -> None:
    whole = load(recipe, name)()
    with warnings.catch_warnings(action="ignore"):
        offloaded = WAYS[way](load(recipe, name), tmp_path)
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(whole))
    assert torch.equal(generated(offloaded), generated(whole))


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_nothing_is_left_behind_between_forwards(load, tmp_path, recipe, name) -> None:
    offloaded = WAYS["disk_offload"](load(recipe, name), tmp_path)
    assert not left_behind(offloaded)
    logits(offloaded)
    assert not left_behind(offloaded)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4-rrs", "w4a16-asymmetric", "w8a8-tables"])
def test_a_forward_reads_what_the_hooks_bring(load, recipe) -> None:
    other = changed(load(recipe)())
    stored = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    before = load(recipe)()
    assert not torch.equal(logits(other), logits(before))
    offloaded = cpu_offload(before, CPU, offload_buffers=True, state_dict=stored)
    assert torch.equal(logits(offloaded), logits(other))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_loading_other_values_takes_effect(load, recipe, assign) -> None:
    model, other = load(recipe)(), changed(load(recipe)())
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(logits(model), logits(other))


def test_what_is_offloaded_is_saved_whole(load, checkpoint, tmp_path) -> None:
    offloaded = WAYS["from_pretrained"](load("w4a8"), tmp_path / "offload")
    logits(offloaded)
    offloaded.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    stored = load_file(checkpoint("w4a8") / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(saved[name], tensor), name


def test_a_model_that_is_not_offloaded_computes_its_running_form_once(load) -> None:
    model = load("w4a4")()
    before = [linear._running.operand for linear in linears(model)]
    logits(model)
    assert all(a._running.operand is b for a, b in zip(linears(model), before, strict=True))
    placed = dispatch_model(load("w4a4")(), {"": "cpu"}, force_hooks=True)
    logits(placed)
    before = [linear._running.operand for linear in linears(placed)]
    logits(placed)
    assert all(a._running.operand is b for a, b in zip(linears(placed), before, strict=True))


def test_codes_of_8_bits_are_their_own_operand(load) -> None:
    linear = linears(load("w8a8")())[0]
    assert linear._running.operand.data_ptr() == linear.codes.data_ptr()


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_an_operand_ends_with_its_codes(load, recipe) -> None:
    linear = linears(load(recipe)())[0]
    operand = weakref.ref(linear._running.operand)
    gc.disable()  # a cycle would keep the memory for long
    try:
        linear.hold(linear.codes.clone())
        assert operand() is None
        linear.prepare()
        operand = weakref.ref(linear._running.operand)
        linear._running = None
        assert operand() is None
    finally:
        gc.enable()


def test_few_tokens_of_an_offloaded_linear_unpack_nothing(load, tmp_path, monkeypatch) -> None:
    if not (limit := load("w4a4-rrs")().model.layers[0].mlp.up_proj._running.packed_tokens):
        pytest.skip("no product of packed codes here")
    offloaded = WAYS["disk_offload"](load("w4a4-rrs"), tmp_path)
    unpacked = []
    stock = QuantizedLinear._unpacked
    monkeypatch.setattr(
        QuantizedLinear, "_unpacked", lambda *args: unpacked.append(args) or stock(*args)
    )
    with torch.no_grad():
        offloaded(IDS[:1, :1])
    assert not unpacked
    with torch.no_grad():
        offloaded(torch.zeros(1, limit + 1, dtype=torch.int64))
    assert len(unpacked) == 21


def test_factors_that_were_moved_one_by_one_are_split_again(load) -> None:
    model = load("w4a4")()
    expected = logits(model)
    for module in model.modules():
        if isinstance(module, OnlineRotation):
            module._split_for = torch.device("cuda", 0)
            module.left, module.right = module.left[:1, :1], module.right[:1, :1]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8-kv4", "w8a8-tables"])
def test_a_report_names_where_it_runs(load, tmp_path, recipe) -> None:
    expected = kernels.report(load(recipe)())
    assert kernels.report(WAYS["disk_offload"](load(recipe), tmp_path)) == expected


def test_it_is_evaluated(load, tmp_path) -> None:
    tokens = IDS.reshape(1, -1)
    expected = perplexity(load("w4a8")(), tokens, sequence_length=12).perplexity
    offloaded = WAYS["disk_offload"](load("w4a8"), tmp_path)
    assert perplexity(offloaded, tokens, sequence_length=12).perplexity == expected


def test_it_may_stay_packed(load, tmp_path) -> None:
    expected = logits(load("w4a8")())
    offloaded = WAYS["disk_offload"](load("w4a8"), tmp_path)
    keep_packed(offloaded)
    assert torch.equal(logits(offloaded), expected)


class TestRefusals:
    def test_a_call_past_the_hooks(self, load, tmp_path) -> None:
        linear: Any = linears(WAYS["disk_offload"](load("w8a8"), tmp_path))[0]
        with pytest.raises(RuntimeError, match="past the hooks"):
            linear._old_forward(torch.zeros(1, linear.in_features))

    def test_dequantizing(self, load, tmp_path) -> None:
        offloaded = WAYS["from_pretrained"](load("w8a8"), tmp_path)
        with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1.* is offloaded"):
            offloaded.dequantize()

    def test_weights_that_stay_are_warned_of(self, load, tmp_path) -> None:
        with pytest.warns(UserWarning, match=r"'model\.layers\.1.* without its weight"):
            loaded_in_parts(load("w8a8"), tmp_path)
        with warnings.catch_warnings(action="error", category=UserWarning):
            WAYS["from_pretrained"](load("w8a8"), tmp_path)
