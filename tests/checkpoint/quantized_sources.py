"""Tiny models whose weights are quantized already, each with its twin of decoded weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests.released_models import released_model
from tests.tiny_models import VOCABULARY, with_random_values

BLOCK = 32  # of rows and columns that share a scale: 80 rows of `kv_a_proj_with_mqa` end in 16
WEIGHTS = "model.safetensors"


def fp8_deepseek(folder: Path) -> tuple[Path, Path]:
    """A DeepSeek-V3 in FP8 blocks, and its twin in bfloat16, in a folder."""
    encoded, twin = (folder / name for name in ("fp8", "bfloat16"))
    released_model("deepseek_v3", torch.bfloat16).save_pretrained(twin)
    shapes = []

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if "proj" not in name:
            return {name: weight}, {name: weight}
        shapes.append(weight.shape)
        scale = block_maxima(weight.float()) / torch.finfo(torch.float8_e4m3fn).max
        codes = (weight.float() / spread(scale, weight)).to(torch.float8_e4m3fn)
        decoded = (codes.float() * spread(scale, weight)).bfloat16()
        beside = {name.replace("weight", "input_scale"): torch.ones(1)}
        return {name: codes, f"{name}_scale_inv": scale, **beside}, {name: decoded}

    rewrite(twin, encoded, encode)
    assert any(rows % BLOCK for rows, _ in shapes)
    add_to_config(encoded, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    return encoded, twin


def mxfp4_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """A GPT-OSS with experts in MXFP4, and its twin in bfloat16, in a folder."""
    encoded, twin = (folder / name for name in ("mxfp4", "bfloat16"))
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        eos_token_id=1,
        pad_token_id=None,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with_random_values(model.bfloat16()).save_pretrained(twin)
    generator = torch.Generator().manual_seed(0)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: weight}, {name: weight}
        experts, columns, rows = weight.shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 124, shape[:-1], dtype=torch.uint8, generator=generator)
        return (
            {f"{name}_blocks": blocks, f"{name}_scales": scales},
            {name: convert_moe_packed_tensors(blocks, scales)},
        )

    rewrite(twin, encoded, encode)
    add_to_config(encoded, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed"]})
    return encoded, twin


def block_maxima(weight: Tensor) -> Tensor:
    """The largest magnitude of each block, of which the last may be short."""
    return torch.stack(
        [
            torch.stack([part.abs().max() for part in rows.split(BLOCK, 1)])
            for rows in weight.split(BLOCK)
        ]
    )


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """The scale of each element of a weight."""
    rows, columns = weight.shape
    every = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return every[:rows, :columns]


def rewrite(
    twin: Path,
    encoded: Path,
    encode: Callable[[str, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> None:
    """Write an encoded model beside its float one, which takes the decoded weights.

    encode: name and weight → what is stored of it, and what that decodes to.
    """
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name, weight in load_file(twin / WEIGHTS).items():
        parts, float_parts = encode(name, weight)
        stored |= parts
        decoded |= float_parts
    encoded.mkdir()
    for path in twin.iterdir():
        if path.name != WEIGHTS:
            (encoded / path.name).write_bytes(path.read_bytes())
    save_file(stored, encoded / WEIGHTS, {"format": "pt"})
    save_file(decoded, twin / WEIGHTS, {"format": "pt"})


def add_to_config(folder: Path, quantization: dict[str, object]) -> None:
    """Have the config of a model say that it is quantized."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
