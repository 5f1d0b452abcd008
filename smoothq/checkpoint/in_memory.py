"""A model in memory as it may arrive: wrapped, compiled, offloaded, or none that can be taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import causal_lm_classes, tensor_parallel_size
from ..errors import UnsupportedModelError

_COMPILED = "_orig_mod"  # where torch.compile holds the module that it wraps
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: Any) -> PreTrainedModel:
    """The causal LM that was given, out of what compiles it or runs it on several devices.

    Raises UnsupportedModelError, saying what to give instead, for all that is no float causal LM of
    transformers with its weights whole: adapters, shards, another head or none, another tool's
    quantized weights, or no model.
    """
    while not isinstance(model, PreTrainedModel):
        inner = _wrapped(model)
        if inner is None:
            raise UnsupportedModelError(_no_model(model))
        model = inner
    name = type(model).__name__
    _refuse_adapters(model, name)
    _refuse_other_heads(model, name)
    _refuse_other_tensors(model, name)
    return model


def tensors_of(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Parameters and persistent buffers by name; what accelerate offloads is read when asked for.

    Raises UnsupportedModelError for a tensor that is nowhere.
    """
    held = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    offloaded = {}
    for full in (name for name, tensor in held.items() if tensor.is_meta):
        found = _offload(model, full)
        if found is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its tensor '{full}' is on the meta device and in no "
                "offload of accelerate's: give the folder's path instead of the model"
            )
        offloaded[full] = found
    return _Offloading(held, offloaded) if offloaded else held


def module_types(model: nn.Module) -> dict[str, type[nn.Module]]:
    """The type of every module by name, of what torch.compile wraps its own."""
    names = {f"{name}.": module for name, module in model.named_modules()}
    return {_plain(name).rstrip("."): type(module) for name, module in names.items()}


def held_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a model's tensors; what shares memory counts once."""
    if isinstance(tensors, _Offloading):
        return tensors.nbytes
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors.values()}
    return sum(storages.values())


class _Offloading(Mapping[str, Tensor]):
    """A model's tensors, some of which are read from accelerate's offload, one when it is asked."""

    def __init__(
        self, held: dict[str, Tensor], offloaded: dict[str, tuple[Mapping[str, Tensor], str]]
    ) -> None:
        """held: all by name. offloaded: for some, the map that has it, and its name there."""
        self._held, self._offloaded = held, offloaded

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._offloaded:
            return self._held[name]
        weights, key = self._offloaded[name]
        return weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _plain(name: str) -> str:
    """A tensor's name without the wrappers of compiled submodules in it."""
    return name.replace(f"{_COMPILED}.", "")


def _offload(model: nn.Module, full: str) -> tuple[Mapping[str, Tensor], str] | None:
    """Where accelerate's hook of a tensor's module, or of one around it, holds the tensor."""
    for name, module in model.named_modules():
        prefix = f"{_plain(name)}." if name else ""
        if not full.startswith(prefix):
            continue
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            weights = getattr(each, "weights_map", None)
            try:
                if weights is not None and weights[full.removeprefix(prefix)] is not None:
                    return weights, full.removeprefix(prefix)
            except KeyError:
                continue
    return None


def _wrapped(model: Any) -> Any:
    """What a wrapper holds: of torch.compile, or of data in parallel; None where it is none."""
    if not isinstance(model, nn.Module):
        return None
    if _COMPILED in model._modules:
        return model._modules[_COMPILED]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return None


def _no_model(given: Any) -> str:
    """Why what was given cannot be taken, and what to give."""
    name = type(given).__name__
    ancestors = {
        f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in type(given).mro()
    }
    if any(each.startswith("peft.") for each in ancestors):
        if hasattr(given, "merge_and_unload"):
            return f"{name} holds an adapter beside its weights: give model.merge_and_unload()"
        return f"{name} holds a learned prompt, which no weight can take in: give its base model"
    if any(each.rpartition(".")[2] in _SHARDED for each in ancestors):
        return f"{name} holds shards of its weights: save the whole model, and give the folder"
    if isinstance(getattr(given, "model", None), PreTrainedModel):
        return f"{name} is no model: give its .model"
    return f"{name} is no model: give a folder, a hub id, or a PreTrainedModel of transformers"


def _refuse_adapters(model: PreTrainedModel, name: str) -> None:
    """Refuse layers that peft put in: their weights are another sum than those that are stored."""
    for layer, module in model.named_modules():
        if any(each.__module__.startswith("peft.") for each in type(module).mro()):
            raise UnsupportedModelError(
                f"{name}: '{layer}' holds an adapter beside its weight: save the adapter, load it "
                "by peft.PeftModel.from_pretrained(base, folder), and give its merge_and_unload()"
            )


def _refuse_other_heads(model: PreTrainedModel, name: str) -> None:
    """Refuse a class that predicts no next token."""
    classes = causal_lm_classes(model.config)
    if not classes:
        return  # code of its own, or no causal LM at all: building it will say so
    if not isinstance(model, classes):
        raise UnsupportedModelError(
            f"{name} has no head that predicts tokens: load it as {classes[0].__name__}, as "
            "AutoModelForCausalLM.from_pretrained does"
        )


def _refuse_other_tensors(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that are not whole float tensors: shards, or another tool's codes."""
    odd = {
        full: f"{type(value.data).__name__} of {value.dtype}"
        for full, value in model.named_parameters()
        if type(value) not in (nn.Parameter, Tensor)
        or type(value.data) is not Tensor
        or (full.endswith(".weight") and not value.is_floating_point())
    }
    for full, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # of torch's own quantized layers
            odd.setdefault(full, type(value).__name__)
    if tensor_parallel_size(model) > 1:
        odd.setdefault("tp_plan", "plan that leaves each process a share of the weights")
    for full, kind in odd.items():
        raise UnsupportedModelError(
            f"{name}: '{full}' is a {kind}, no float tensor: where another tool quantized the "
            "model give the float one, where several processes share it the folder's path"
        )
