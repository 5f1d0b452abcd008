"""Tiny models of other classes than causal LMs: with towers, without a head, with own code.

Batches are built by hand: no processor and no image library is needed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlavaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2AudioConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from tests.tiny_models import TINY, VOCABULARY, with_random_values

IMAGE, BEGIN, END = 96, 94, 93  # tokens that stand for a patch, and around an image
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 95,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}


def _llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**_VISION, num_hidden_layers=2, image_size=28, patch_size=14)
    config = LlavaConfig(
        text_config=TINY["llama-untied"]().to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return AutoModelForImageTextToText.from_config(config)


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {
        **_QWEN_VISION,
        "depth": 2,
        "window_size": 16,
        "out_hidden_size": 96,
        "fullatt_block_indexes": [1],
    }
    text = TINY["qwen2"]().to_dict() | {
        "model_type": "qwen2_5_vl_text",
        "layer_types": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **_QWEN_TOKENS, tie_word_embeddings=True
    )
    return AutoModelForImageTextToText.from_config(config)


def _qwen3_vl() -> PreTrainedModel:
    """Its vision tower hands on features of its first block, which are added behind block 0."""
    vision = {
        **_QWEN_VISION,
        "depth": 2,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
        },
        "pad_token_id": None,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)
    return AutoModelForImageTextToText.from_config(config)


def _qwen3_5() -> PreTrainedModel:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 0, 0],
            "partial_rotary_factor": 0.25,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    vision = {
        **_QWEN_VISION,
        "depth": 1,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
    }
    config = Qwen3_5Config(text_config=text, vision_config=vision, **_QWEN_TOKENS)
    return AutoModelForImageTextToText.from_config(config)


def _qwen2_audio() -> PreTrainedModel:
    audio = {
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 8,
        "max_source_positions": 8,
    }
    text = Qwen2Config(**TINY["qwen2"]().to_dict() | {"tie_word_embeddings": False})
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text.to_dict(), audio_token_index=IMAGE
    )
    return AutoModelForMultimodalLM.from_config(config)


def _classifier(name: str, labels: int) -> PreTrainedModel:
    config = TINY[name]()
    config.num_labels = labels
    return AutoModelForSequenceClassification.from_config(config)


CLASSES: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_audio": _qwen2_audio,
    "reward model": lambda: _classifier("llama", 1),
    "classifier": lambda: _classifier("qwen3", 2),
    "embedder": lambda: AutoModel.from_config(TINY["llama-untied"]()),
    "embedder, gpt2": lambda: AutoModel.from_config(TINY["gpt2"]()),
    "embedder, opt": lambda: AutoModel.from_config(TINY["opt"]()),
}

MORE = {"qwen3_5": _qwen3_5, "qwen3_vl": _qwen3_vl}  # that not every test takes


def tiny_class(name: str) -> PreTrainedModel:
    """A float32 model of `CLASSES` or `MORE` with random values, as `tiny_model`'s."""
    make = (CLASSES | MORE)[name]
    return with_random_values(make().float())


def batch_of(name: str) -> dict[str, Any]:
    """What a model of `CLASSES` is called with: tokens, and images or sound."""
    generator = torch.Generator().manual_seed(4)
    if name == "llava":
        ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9]])
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    if name == "qwen2_5_vl":
        ids = torch.tensor([[5, BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 8]])
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    if name == "qwen2_audio":
        ids = torch.tensor([[5, *[IMAGE] * 4, 7, 8]])
        return {
            "input_ids": ids,
            "input_features": torch.randn(1, 8, 16, generator=generator),
            "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "attention_mask": torch.ones_like(ids),
        }
    return {"input_ids": torch.arange(5, 25)[None]}


def answer(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A model's answer to `batch_of`: logits, or last hidden states without any."""
    with torch.no_grad():
        output = model(**batch_of(name))
    return output.logits if "logits" in output else output.last_hidden_state


OWN_MODELING = '''"""A model's own code."""
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "{model_type}"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
'''


def write_own_code(directory: Path, model_type: str) -> None:
    """Give a Llama's directory a class of its own, in a file beside the weights."""
    (directory / "modeling_own.py").write_text(OWN_MODELING.format(model_type=model_type))
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
