"""Phi-3: q, k, v in one linear, gate and up in another; otherwise Llama."""

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, attention_heads
from .parts import concatenated_values, fused_gated_mlp, weights, writers


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    qkv, o = weights("self_attn.qkv_proj", "self_attn.o_proj")
    values = concatenated_values(qkv.tensor, heads)
    o_site = Site("o", "values", (o,), Rows((values,), heads))
    gate_up, down = fused_gated_mlp(config, Norm("post_attention_layernorm.weight"))
    return BlockGraph(
        (Site("qkv", "stream", (qkv,), Norm("input_layernorm.weight")), o_site, gate_up, down),
        writers(o_site, down),
    )


FAMILY = Family(("phi3",), _block)
