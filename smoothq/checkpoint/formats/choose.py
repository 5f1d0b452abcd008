"""Which format a config says that a model's weights are quantized in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig

from ...errors import UnsupportedModelError
from ..model_config import dtype_named_by
from .awq import Awq
from .compressed_tensors import METHOD as COMPRESSED_TENSORS
from .compressed_tensors import CompressedTensors
from .format import Format
from .fp8 import Fp8
from .gptq import Gptq
from .modelopt import ModelOpt
from .mxfp4 import Mxfp4

FORMATS: dict[str, type[Format]] = {  # by quant_method
    "fp8": Fp8,
    "mxfp8": Fp8,
    "mxfp4": Mxfp4,
    COMPRESSED_TENSORS: CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "modelopt": ModelOpt,
}
QUANTIZATION = "quantization_config"
_BITSANDBYTES = (
    "; on a machine that runs it: from transformers import AutoModelForCausalLM; "
    "AutoModelForCausalLM.from_pretrained('MODEL').dequantize().save_pretrained('FLOAT'), and "
    "quantize FLOAT"
)


def method_of(config: PretrainedConfig) -> str | None:
    """The `quant_method` that a config names, None for a float model."""
    quantization = _quantization(config)
    return None if quantization is None else str(quantization.get("quant_method"))


def as_float(config: PretrainedConfig, name: str) -> tuple[PretrainedConfig, Format | None]:
    """The config that a model has once its weights are decoded, and the format to decode.

    Args:
        config: of a model's directory; it is left as it is.
        name: of the model, for messages.

    Returns:
        A float model's config is itself, with None. Of a config that names no dtype it is bfloat16.

    Raises:
        UnsupportedModelError: for a format that is not decoded.
    """
    quantization = _quantization(config)
    if quantization is None:
        return config, None
    method = str(quantization.get("quant_method"))
    if method not in FORMATS:
        way = _BITSANDBYTES if method == "bitsandbytes" else "; quantize the float model"
        raise UnsupportedModelError(
            f"{name} is already quantized (quant_method '{method}'), which is not decoded{way}"
        )
    float_config = copy.deepcopy(config)
    for part in (float_config, float_config.get_text_config(decoder=True)):
        if hasattr(part, QUANTIZATION):
            delattr(part, QUANTIZATION)
    if not any(part.dtype for part in (float_config, float_config.get_text_config(decoder=True))):
        float_config.dtype = torch.bfloat16
    return float_config, FORMATS[method](quantization, dtype_named_by(float_config), name)


def refuse_loaded(config: PretrainedConfig, name: str) -> None:
    """Raise UnsupportedModelError if a model in memory is quantized."""
    method = method_of(config)
    if method is not None:
        way = "give its directory, of which weights are decoded"
        raise UnsupportedModelError(
            f"{name} is already quantized (quant_method '{method}'); "
            f"{way if method in FORMATS else 'quantize the float model'}"
        )


def _quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a config, or that of its text model, says of quantization."""
    for part in (config, config.get_text_config(decoder=True)):
        quantization = getattr(part, QUANTIZATION, None)
        if quantization is not None:
            return quantization if isinstance(quantization, dict) else quantization.to_dict()
    return None
