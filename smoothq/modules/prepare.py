"""Steps after a quantized model was loaded: checks, and tensors that are derived, not stored."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..compat import is_initialized
from ..errors import CheckpointError
from ..modules import (
    InputQuantizer,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizesAttention,
    rotated_ends,
)
from ..runtime.offload import align_hooks, is_offloaded, running_device
from .weight_answer import HoldsCodes


def prepare(model: nn.Module) -> None:
    """Compute everything that is not stored, on each module's device, in place.

    Args:
        model: a quantized model, loaded.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            if module.site_input.rotation is not None:
                module.site_input.rotation.prepare(module.device)
            module.prepare()
        elif isinstance(module, QuantizesAttention):
            rotation = module.attention_quantizer.rotation
            if rotation is not None:
                rotation.prepare(module.device)
    for module, rotation in rotated_ends(model):
        rotation.prepare(running_device(module))


def keep_packed(model: nn.Module) -> None:
    """Keep 4-bit weights in packed form only, in place.

    It takes a third of the memory, and is slower on long prompts. By default a layer also holds an
    int8 copy, where products with many tokens are faster on it.

    Args:
        model: a quantized model, loaded.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.keeps_packed = True
            module.prepare()


def weights_that_stay(model: nn.Module) -> Iterator[str]:
    """Names of quantized modules that accelerate offloads without their buffers: all they have."""
    for name, module in model.named_modules():
        hooks = align_hooks(module) if isinstance(module, HoldsCodes) else ()
        if any(getattr(hook, "offload", False) and not hook.offload_buffers for hook in hooks):
            yield name


def check_filled(model: nn.Module) -> None:
    """Check that loading filled every quantized tensor of a model.

    Offloaded ones are read when they are needed; `check_tensors` has looked at their file.

    Raises:
        CheckpointError: the checkpoint has no such tensor; names it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear | InputQuantizer | QuantizedEmbedding):
            continue
        persistent = [key for key in module.state_dict() if "." not in key]
        for key in persistent:
            buffer = module._buffers[key]
            assert buffer is not None
            if not (is_offloaded(module) if buffer.is_meta else is_initialized(buffer)):
                raise CheckpointError(f"tensor '{name}.{key}' is missing in the checkpoint")
