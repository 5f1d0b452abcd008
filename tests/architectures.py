"""One tiny configuration a wiring, and models of them with random weights.

Widths are small but not special: hidden and intermediate sizes are no powers of two and have
Hadamard matrices, 16 divides them all, and every model has grouped-query attention.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_HEADS_OF_16 = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_WIDE_HEADS = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, **_WIDE_HEADS, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(
        **_COMMON, **_WIDE_HEADS, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: MistralConfig(**_COMMON, **_HEADS_OF_16, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_COMMON, **_HEADS_OF_16, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, **_WIDE_HEADS, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(**_COMMON, **_HEADS_OF_16),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, **_HEADS_OF_16, num_local_experts=4, num_experts_per_tok=2
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """The model of a tiny configuration, in eval mode and without gradients.

    Every parameter is random and none is zero: norm weights lie in [0.5, 1.5], biases around 0.
    The same name and seed give the same values in every dtype, up to its rounding.
    """
    # The default experts are grouped products, which float64 does not have.
    model = AutoModelForCausalLM.from_config(TINY[name](), experts_implementation="eager")
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for full_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(_random_parameter(full_name, parameter.shape, generator))
    return model


def _random_parameter(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
