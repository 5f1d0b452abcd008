"""Models in memory: unwrapping, reading offloaded tensors, and refusing unsupported kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import tensor_parallel_size
from ..errors import UnsupportedModelError
from ..runtime.offload import align_hooks

_COMPILED = "_orig_mod"  # where torch.compile holds the module that it wraps
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: Any) -> PreTrainedModel:
    """Return a model without torch.compile, DataParallel or DistributedDataParallel around it.

    Args:
        model: a float decoder of transformers, with any head, possibly wrapped.

    Raises:
        UnsupportedModelError: for adapters, sharded weights, weights quantized by another tool, or
            an object that is no model. The message says what to pass instead.
    """
    while not isinstance(model, PreTrainedModel):
        inner = _wrapped(model)
        if inner is None:
            raise UnsupportedModelError(_no_model(model))
        model = inner
    name = type(model).__name__
    _refuse_adapters(model, name)
    _refuse_other_tensors(model, name)
    return model


def tensors_of(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return parameters and persistent buffers by name; offloaded ones are read on access.

    Raises:
        UnsupportedModelError: for a tensor on the meta device that accelerate has not offloaded.
    """
    tensors = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    offloaded = {}
    for full in (name for name, tensor in tensors.items() if tensor.is_meta):
        location = _offload(model, full)
        if location is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its tensor '{full}' is on the meta device and in no "
                "offload of accelerate's: give the folder's path instead of the model"
            )
        offloaded[full] = location
    return _Offloading(tensors, offloaded) if offloaded else tensors


def module_types(model: nn.Module) -> dict[str, type[nn.Module]]:
    """The type of every module by name; of a compiled module, the type that it wraps."""
    names = {f"{name}.": module for name, module in model.named_modules()}
    return {_plain(name).rstrip("."): type(module) for name, module in names.items()}


def storage_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a model's tensors; a storage that several tensors share counts once."""
    if isinstance(tensors, _Offloading):
        return tensors.nbytes
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors.values()}
    return sum(storages.values())


class _Offloading(Mapping[str, Tensor]):
    """A model's tensors by name; those that accelerate offloaded are read on access."""

    def __init__(
        self, tensors: dict[str, Tensor], offloaded: dict[str, tuple[Mapping[str, Tensor], str]]
    ) -> None:
        """tensors: all by name. offloaded: name → (accelerate's weights map, key in that map)."""
        self._tensors, self._offloaded = tensors, offloaded

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the offloaded ones included."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._offloaded:
            return self._tensors[name]
        weights, key = self._offloaded[name]
        return weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _plain(name: str) -> str:
    """A tensor's name without the wrappers of compiled submodules in it."""
    return name.replace(f"{_COMPILED}.", "")


def _offload(model: nn.Module, full: str) -> tuple[Mapping[str, Tensor], str] | None:
    """The weights map and key under which accelerate offloaded a tensor, or None.

    The map belongs to a hook of the tensor's module or of a module that contains it.
    """
    for name, module in model.named_modules():
        prefix = f"{_plain(name)}." if name else ""
        if not full.startswith(prefix):
            continue
        for hook in align_hooks(module):
            weights = getattr(hook, "weights_map", None)
            try:
                if weights is not None and weights[full.removeprefix(prefix)] is not None:
                    return weights, full.removeprefix(prefix)
            except KeyError:
                continue
    return None


def _wrapped(model: Any) -> Any:
    """The module inside torch.compile's or a data-parallel wrapper; None if this is no wrapper."""
    if not isinstance(model, nn.Module):
        return None
    if _COMPILED in model._modules:
        return model._modules[_COMPILED]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return None


def _no_model(given: Any) -> str:
    """The error message for an object that is no supported model, with what to pass instead."""
    name = type(given).__name__
    ancestors = {
        f"{ancestor.__module__.partition('.')[0]}.{ancestor.__name__}"
        for ancestor in type(given).mro()
    }
    if any(ancestor.startswith("peft.") for ancestor in ancestors):
        if hasattr(given, "merge_and_unload"):
            return f"{name} holds an adapter beside its weights: give model.merge_and_unload()"
        return f"{name} holds a learned prompt, which no weight can take in: give its base model"
    if any(ancestor.rpartition(".")[2] in _SHARDED for ancestor in ancestors):
        return f"{name} holds shards of its weights: save the whole model, and give the folder"
    if isinstance(getattr(given, "model", None), PreTrainedModel):
        return f"{name} is no model: give its .model"
    return f"{name} is no model: give a folder, a hub id, or a PreTrainedModel of transformers"


def _refuse_adapters(model: PreTrainedModel, name: str) -> None:
    """Refuse peft's adapter layers: their effective weight differs from the stored one."""
    for layer, module in model.named_modules():
        if any(ancestor.__module__.startswith("peft.") for ancestor in type(module).mro()):
            raise UnsupportedModelError(
                f"{name}: '{layer}' holds an adapter beside its weight: save the adapter, load it "
                "by peft.PeftModel.from_pretrained(base, folder), and give its merge_and_unload()"
            )


def _refuse_other_tensors(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that are no complete float tensors: shards, or another tool's codes."""
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
