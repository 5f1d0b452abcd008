"""The modules of a quantized model."""

from .attention import (
    AttentionSpec,
    QuantizesAttention,
    quantize_attention,
    stop_quantizing_attention,
)
from .input_quantizer import InputQuantizer, InputSpec, SequenceContext, TracedInputs
from .kv_cache import CacheFormat
from .online_rotation import (
    OnlineRotation,
    rotate_ends,
    rotated_ends,
    stop_rotating,
)
from .quantized_embedding import QuantizedEmbedding, TiedHead
from .quantized_linear import QuantizedLinear, WeightSpec

__all__ = [
    "AttentionSpec",
    "CacheFormat",
    "InputQuantizer",
    "InputSpec",
    "OnlineRotation",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizesAttention",
    "SequenceContext",
    "TiedHead",
    "TracedInputs",
    "WeightSpec",
    "quantize_attention",
    "rotate_ends",
    "rotated_ends",
    "stop_quantizing_attention",
    "stop_rotating",
]
