"""The modules that a quantized model is made of."""

from .input_quantizer import InputQuantizer, InputSpec, SequenceContext
from .online_rotation import OnlineRotation, rotate_ends, stop_rotating
from .quantized_embedding import QuantizedEmbedding, TiedHead
from .quantized_linear import QuantizedLinear, WeightSpec

__all__ = [
    "InputQuantizer",
    "InputSpec",
    "OnlineRotation",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SequenceContext",
    "TiedHead",
    "WeightSpec",
    "rotate_ends",
    "stop_rotating",
]
