"""The float model of a config with parameters on the meta device: its skeleton."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..compat import build_model, initialize_unmarked, mark_initialized, remove_tie, tied_weights
from ..errors import UnsupportedModelError, first_line
from ..runtime.process import build_lock, default_modes
from .model_class import class_of
from .model_config import dtype_named_by


def skeleton_of(
    config: PretrainedConfig, name: str, kind: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Build the float model of a config, in eval mode, with parameters on the meta device.

    Floats have the dtype that the config names. The config may be a quantized checkpoint's.

    Args:
        config: of the model.
        name: of the model, for messages.
        kind: class of the model; None for the one that the config stands for.

    Raises:
        UnsupportedModelError: for a config that fits no model.
    """
    try:
        model = empty_model(config, kind)
    except Exception as error:  # transformers has no common base for unfit configs
        raise UnsupportedModelError(
            f"{name}: no model can be built from its config: {first_line(error)}"
        ) from error
    # `empty_model` builds in float32, which transformers recorded in the config.
    model.config.dtype = config.dtype
    named = dtype_named_by(config)
    take_dtypes(model, {name: named for name, _ in model.named_parameters()})
    model.eval()
    return model


def empty_model(
    config: PretrainedConfig, kind: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Build the model of a config with parameters on the meta device and real buffers.

    No weight is allocated. Whatever transformers raises for a config that fits no model, this
    raises too.

    Args:
        config: of the model.
        kind: class of the model; None for the one that the config stands for.
    """
    kind = kind or class_of(config)
    with build_lock, default_modes():
        with torch.device("meta"):
            model = build_model(kind, copy.deepcopy(config), torch.float32)
        _make_buffers(model)
    return model


def _make_buffers(model: PreTrainedModel) -> None:
    """Give a model on the meta device real buffers, computed as `from_pretrained` computes them.

    A persistent buffer is zero until it is read, unless the model's class initialises it. Raises
    UnsupportedModelError for a non-persistent buffer that only `__init__` computes: transformers
    would load the model with uninitialised memory there.
    """
    computed: dict[str, tuple[Tensor, int]] = {}
    for prefix, module in list(model.named_modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.is_meta:  # made by an operator that ignores the default device
                setattr(module, name, nn.Parameter(weight.data.to("meta"), weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            real = torch.zeros_like(buffer, device="cpu")
            setattr(module, name, real)
            if name in module._non_persistent_buffers_set and real.numel():
                computed[f"{prefix}.{name}"] = real, real._version
    for parameter in model.parameters():
        mark_initialized(parameter)
    initialize_unmarked(model)
    for name, (real, version) in computed.items():
        if model.get_buffer(name) is real and real._version == version:
            raise UnsupportedModelError(
                f"its buffer '{name}' is not stored, and its class does not compute it anew when "
                "transformers loads the model"
            )


def untie(model: PreTrainedModel, target: str) -> None:
    """Untie a parameter in place: it becomes a parameter by itself, on the meta device.

    Args:
        model: whose `all_tied_weights_keys` has the parameter.
        target: full name of the parameter.
    """
    remove_tie(model, target)
    _set_tensor(model, target, torch.empty_like(model.get_parameter(target), device="meta"))


def take_dtypes(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    """Give a skeleton's floats their stored dtypes, by full name, and tie again what is tied."""
    for name, tensor in model.state_dict().items():
        if name in dtypes and tensor.is_floating_point() and dtypes[name].is_floating_point:
            _set_tensor(model, name, tensor.to(dtypes[name]))
    for target, source in tied_weights(model).items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by full name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
