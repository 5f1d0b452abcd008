"""Small models of the families that were released last, with prompts for them.

Every kind of block that the family has is in them: linear attention beside attention, state spaces,
short convolutions, latent attention, dense MLPs beside experts. Those with images get one in the
prompt. They are wide enough that a rotation spreads an outlier over many channels.
"""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from smoothq.compat import use_eager_experts
from tests.tiny_models import VOCABULARY, with_random_values

IMAGE, BEGIN, END = 96, 94, 93  # tokens that stand for a patch, and around an image
PLACEHOLDERS = [*range(90, VOCABULARY)]
PLACES = slice(3, 7)  # of the image in a prompt
LENGTH = 20  # of a prompt

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_TEXT: dict[str, Any] = _TOKENS | {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "hidden_size": 256,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 16,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_SHORT = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}


def _rotary(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope}


_QWEN3_5 = _DELTA | _rotary(2, 1, 1, partial_rotary_factor=0.25)

TEXT: dict[str, dict[str, Any]] = {
    "llama": _TEXT,
    "qwen3_next": _TEXT | _EXPERTS | _DELTA | {"shared_expert_intermediate_size": 80},
    "deepseek_v2": _TEXT
    | _ROUTED
    | _LATENT
    | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": _TEXT | _ROUTED | _LATENT | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "glm4_moe": _TEXT | _ROUTED | {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    "glm4_moe_lite": _TEXT | _ROUTED | _LATENT | {"mlp_layer_types": ["dense", "sparse"]},
    "kimi_linear": _TEXT
    | _LATENT
    | _EXPERTS
    | {
        "num_experts_per_token": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minimax_m2": _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": _TEXT
    | _ROUTED
    | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 80,
    },
    "granitemoehybrid": _TEXT
    | _MAMBA
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 80,
    },
    "falcon_h1": _TEXT | _MAMBA | {"mamba_d_ssm": 256},
    "jamba": _TEXT
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "mamba_expand": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": _TEXT | _SHORT | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": _TEXT | _EXPERTS | _SHORT | {"num_dense_layers": 1},
    "ernie4_5_moe": _TEXT
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1},
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 128,
}
_QWEN_IMAGE = {
    "image_token_id": IMAGE,
    "video_token_id": 95,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
_PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
IMAGES: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": _TEXT | _QWEN3_5,
        "vision_config": _QWEN_VISION | {"num_position_embeddings": 16},
        **_QWEN_IMAGE,
    },
    "qwen3_5_moe": {
        "text_config": _TEXT | _QWEN3_5 | _EXPERTS | {"shared_expert_intermediate_size": 80},
        "vision_config": _QWEN_VISION | {"num_position_embeddings": 16},
        **_QWEN_IMAGE,
    },
    "gemma4": {
        "text_config": _TEXT
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
            "sliding_window": 8,
            "pad_token_id": 0,
        },
        "vision_config": _PATCHES
        | {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2},
        "image_token_id": IMAGE,
        "boi_token_id": BEGIN,
        "eoi_token_id": END,
    },
    "llama4": {
        "text_config": _TEXT
        | {
            "intermediate_size": 48,
            "intermediate_size_mlp": 80,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 16,
        },
        "vision_config": _PATCHES
        | {
            "intermediate_size": 128,
            "image_size": 16,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _rotary(4, 6, 6),
        "vision_config": _QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN_IMAGE,
    },
    "qwen3_vl": {
        "text_config": _TEXT | _rotary(6, 5, 5) | {"num_hidden_layers": 3},
        "vision_config": _QWEN_VISION
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_IMAGE,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _PATCHES | {"model_type": "pixtral", "image_size": 16, "head_dim": 16},
        "image_token_index": IMAGE,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _PATCHES
        | {"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 32},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _PATCHES | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
}
# In transformers 5.24 Llama 4's class for images reads a field that its text model does not return.
MoeCausalLMOutputWithPast.image_outputs = None
RELEASED = [*(name for name in TEXT if name != "llama"), *IMAGES]


def released_config(name: str) -> PretrainedConfig:
    """The config of a small model."""
    return AutoConfig.for_model(name, **(TEXT | IMAGES)[name])


def released_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small model with random values, the same in every dtype up to its rounding."""
    auto: Any = AutoModelForImageTextToText if name in IMAGES else AutoModelForCausalLM
    model = with_random_values(auto.from_config(released_config(name), dtype=dtype))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():  # not the complex ones of Llama 4's tower
            tensor.data = tensor.data.to(dtype)
    if name == "gemma4":  # whose attention has no scale: norms of queries have it in them
        for parameter, values in model.named_parameters():
            if parameter.endswith("q_norm.weight"):
                values.mul_(_TEXT["head_dim"] ** -0.5)
    use_eager_experts(model)
    return model


def text_tokens() -> torch.Tensor:
    """Text, int64 (8, 2 · LENGTH)."""
    return torch.randint(2, 90, (8, 2 * LENGTH), generator=torch.Generator().manual_seed(3))


def prompt(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A prompt of one row: with an image at PLACES, for a model that takes one."""
    ids = text_tokens()[:1, :LENGTH]
    if name not in IMAGES:
        return {"input_ids": ids}
    ids[0, PLACES] = IMAGE
    inputs: dict[str, Any] = {"input_ids": ids}
    generator = torch.Generator().manual_seed(1)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    match name:
        case "gemma4":
            sides = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
            inputs["pixel_values"] = pixels(1, 16, 3 * 4 * 4)
            inputs["image_position_ids"] = sides.view(1, 16, 2)
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        case "llava":
            inputs["pixel_values"] = pixels(1, 3, 8, 8)
        case "mistral3":
            inputs["pixel_values"] = pixels(1, 3, 16, 16)
            inputs["image_sizes"] = torch.tensor([[16, 16]])
        case "llama4" | "internvl":
            inputs["pixel_values"] = pixels(1, 3, 16, 16)
        case _:
            inputs["pixel_values"] = pixels(16, 3 * 2 * 4 * 4)
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs
