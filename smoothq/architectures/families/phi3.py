"""Phi-3: q, k, v in one linear, gate and up in another; otherwise Llama."""

from transformers import PretrainedConfig

from ..graph import (
    BlockGraph,
    Family,
    Norm,
    attention_heads,
)
from ..parts import (
    concatenated_values,
    fused_attention,
    fused_gated_mlp,
    weights,
    writers,
)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    fused, proj = weights("self_attn.qkv_proj", "self_attn.o_proj")
    values = (concatenated_values(fused.tensor, heads),)
    qkv, o = fused_attention(fused, proj, values, heads, Norm("input_layernorm.weight"))
    gate_up, down = fused_gated_mlp(config, Norm("post_attention_layernorm.weight"))
    return BlockGraph((qkv, o, gate_up, down), writers(o, down))


FAMILY = Family(("phi3",), _block)
