"""Steps after a quantized model was loaded: checks, and tensors that are derived, not stored."""

from __future__ import annotations

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
        rotation.prepare(next(iter(module.state_dict().values())).device)


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


def check_filled(model: nn.Module) -> None:
    """Check that loading filled every quantized tensor of a model.

    Raises:
        CheckpointError: the checkpoint has no such tensor; names it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear | InputQuantizer | QuantizedEmbedding):
            continue
        persistent = [key for key in module.state_dict() if "." not in key]
        for key in persistent:
            if not is_initialized(module._buffers[key]):
                raise CheckpointError(f"tensor '{name}.{key}' is missing in the checkpoint")
