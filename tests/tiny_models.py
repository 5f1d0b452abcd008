"""One tiny configuration a wiring, and models of them with random weights.

Widths are small but not special: hidden and intermediate sizes are no powers of two and have
Hadamard matrices, 16 divides them all, and attention is grouped-query where the family has it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 97

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_COMMON: dict[str, Any] = _TOKENS | {
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
_HEADS_OF_16 = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_WIDE_HEADS = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_FALCON = {"hidden_size": 96, "num_hidden_layers": 3, "ffn_hidden_size": 80} | _TOKENS
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3(config: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return config(**_COMMON, **_WIDE_HEADS, sliding_window=8, layer_types=layers, **more)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, **_WIDE_HEADS, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(
        **_COMMON, **_WIDE_HEADS, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: MistralConfig(**_COMMON, **_HEADS_OF_16, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_COMMON, **_HEADS_OF_16, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, **_WIDE_HEADS, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(**_COMMON, **_HEADS_OF_16),
    "glm": lambda: GlmConfig(**_COMMON, **_WIDE_HEADS, attention_bias=True),
    "glm4": lambda: Glm4Config(**_COMMON, **_WIDE_HEADS, attention_bias=True),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, **_WIDE_HEADS, sliding_window=8, query_pre_attn_scalar=16
    ),
    "gemma3_text": lambda: _gemma3(Gemma3TextConfig, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3Config(
        text_config=_gemma3(Gemma3TextConfig, query_pre_attn_scalar=16).to_dict(),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
    ),
    "olmo2": lambda: Olmo2Config(**_COMMON, **_HEADS_OF_16, tie_word_embeddings=False),
    "cohere": lambda: CohereConfig(**_COMMON, **_HEADS_OF_16, use_qk_norm=True),
    "opt": lambda: OPTConfig(
        **_TOKENS,
        hidden_size=96,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        word_embed_proj_dim=96,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    "bloom": lambda: BloomConfig(
        **_TOKENS, hidden_size=96, n_layer=3, n_head=6, **_NO_DROPOUT, tie_word_embeddings=True
    ),
    "bloom-untied": lambda: BloomConfig(
        **_TOKENS, hidden_size=96, n_layer=3, n_head=6, **_NO_DROPOUT, tie_word_embeddings=False
    ),
    "gpt2": lambda: GPT2Config(
        **_TOKENS, n_embd=96, n_inner=80, n_layer=3, n_head=6, n_positions=64
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_COMMON, hidden_size=96, num_attention_heads=6, tie_word_embeddings=False
    ),
    "gpt_neox-serial": lambda: GPTNeoXConfig(
        **_COMMON, hidden_size=96, num_attention_heads=6, use_parallel_residual=False
    ),
    "falcon": lambda: FalconConfig(**_FALCON, num_attention_heads=6),
    "falcon-alibi": lambda: FalconConfig(
        **_FALCON,
        num_attention_heads=6,
        multi_query=False,
        alibi=True,
        parallel_attn=False,
        bias=True,
    ),
    "falcon-groups": lambda: FalconConfig(
        **_FALCON,
        num_attention_heads=6,
        num_kv_heads=2,
        new_decoder_architecture=True,
        tie_word_embeddings=False,
    ),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, **_HEADS_OF_16, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, **_HEADS_OF_16, **_EXPERTS, shared_expert_intermediate_size=80
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_WIDE_HEADS, **_EXPERTS, mlp_only_layers=[1]),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON,
        **_WIDE_HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """The model of a tiny configuration, in eval mode and without gradients.

    Every parameter is random and none is zero: norm weights lie in [0.5, 1.5], biases around 0.
    The same name and seed give the same values in every dtype, up to its rounding.
    """
    # The default experts are grouped products, which float64 does not have.
    model = AutoModelForCausalLM.from_config(TINY[name](), experts_implementation="eager")
    return with_random_values(model.to(dtype), seed)


def wide_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers whose hidden size is a block of 128, with its class's random values.

    changes: fields of its configuration.
    """
    torch.manual_seed(0)
    settings = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 96,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def with_random_values(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model of any class, in eval mode and without gradients, with values as `tiny_model`'s."""
    generator = torch.Generator().manual_seed(seed)
    for full_name, parameter in model.eval().named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(_random_parameter(full_name, parameter.shape, generator))
    return model


def _random_parameter(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    owner, _, kind = name.rpartition(".")
    if kind == "weight" and ("norm" in owner.rpartition(".")[2] or ".ln_" in owner):
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
