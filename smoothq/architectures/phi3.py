"""Phi-3: q, k, v in one linear, gate and up in another; otherwise Llama."""

from itertools import pairwise

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, WeightRef, attention_heads


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    queries, values = heads.query * heads.dim, heads.key_value * heads.dim
    bounds = (0, queries, queries + values, queries + 2 * values)
    q, k, v = (WeightRef("self_attn.qkv_proj.weight", rows=rows) for rows in pairwise(bounds))
    width = config.intermediate_size
    gate = WeightRef("mlp.gate_up_proj.weight", rows=(0, width))
    up = WeightRef("mlp.gate_up_proj.weight", rows=(width, 2 * width))
    o = WeightRef("self_attn.o_proj.weight")
    down = WeightRef("mlp.down_proj.weight")
    return BlockGraph(
        sites=(
            Site("qkv", (q, k, v), Norm("input_layernorm.weight")),
            Site("o", (o,), Rows(v, heads)),
            Site("gate_up", (gate, up), Norm("post_attention_layernorm.weight")),
            Site("down", (down,), Rows(up)),
        ),
        residual_writers=(o, down),
    )


FAMILY = Family(("phi3",), _block)
