"""How llama.cpp runs a model: its architectures, and what a GGUF file says of shape and RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from torch import Tensor

from ..errors import UnsupportedModelError
from ..version import __version__
from .reader import ExportReader

ROPE = {  # rope_type → parameters that it must have
    "default": set[str](),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {
        *("factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),
    },
}
# Further parameters, with the only values that are supported.
ROPE_PLAIN = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1}


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs a model_type.

    Attributes:
        arch: llama.cpp's architecture.
        pairs: whether the two rows that RoPE rotates together are adjacent in a head, instead of
            half a head apart.
        biases: names of the tensors that may have a bias.
        rope_tensor: whether the file may hold RoPE frequency factors.
    """

    arch: gguf.MODEL_ARCH
    pairs: bool
    biases: frozenset[str]
    rope_tensor: bool


_INPUTS = frozenset({"attn_q", "attn_k", "attn_v"})
_LINEARS = _INPUTS | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
_LLAMA = Family(gguf.MODEL_ARCH.LLAMA, True, _LINEARS, True)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, False, _INPUTS, False),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, False, _INPUTS, False),
}


def describe(writer: GGUFWriter, folded: ExportReader, family: Family) -> None:
    """Add the metadata of a model: shape and RoPE."""
    config = folded.source.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    if family.arch is gguf.MODEL_ARCH.QWEN2 and heads * size != hidden:
        raise UnsupportedModelError(f"{folded.name}: llama.cpp wants heads of {hidden // heads}")
    writer.add_name(folded.source.directory.resolve().name)
    writer.add_quantized_by(f"smoothq {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    _describe_rope(writer, folded, family)


def _describe_rope(writer: GGUFWriter, folded: ExportReader, family: Family) -> None:
    rope: dict[str, Any] = folded.source.config.rope_parameters
    kind = rope["rope_type"]
    told = {key for key, value in rope.items() if value not in (None, ROPE_PLAIN.get(key))}
    odd = (told - {"rope_type", "rope_theta", "type"}) ^ ROPE.get(kind, set())
    if kind not in ROPE or odd or (kind == "llama3" and not family.rope_tensor):
        which = f" and {', '.join(sorted(odd))}" if odd else ""
        raise UnsupportedModelError(
            f"{folded.name}: llama.cpp has no place here for rotary positions of the kind "
            f"'{kind}'{which}; export it in another format"
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("default", "llama3"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(folded: ExportReader) -> Tensor | None:
    """Divisors of the RoPE frequencies for `llama3`, float32 (head size / 2,); None for others."""
    rope = folded.source.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    model: Any = folded.model.base_model
    frequencies: Tensor = model.rotary_emb.inv_freq
    places = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    plain: Tensor = rope["rope_theta"] ** -places
    return (plain / frequencies).float()
