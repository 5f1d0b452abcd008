"""What is derived of a quantized model's modules once they are loaded."""

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
    """Derive everything that is not stored, on each module's device, after loading."""
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
    """Hold 4-bit weights packed alone, in place: a third of their memory, slower on long prompts.

    A layer whose operator multiplies int8 copies faster otherwise holds both forms.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.keeps_packed = True
            module.prepare()


def check_filled(model: nn.Module) -> None:
    """Raise CheckpointError for a quantized tensor that loading left uninitialised."""
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear | InputQuantizer | QuantizedEmbedding):
            continue
        persistent = [key for key in module.state_dict() if "." not in key]
        for key in persistent:
            if not is_initialized(module._buffers[key]):
                raise CheckpointError(f"tensor '{name}.{key}' is missing in the checkpoint")
