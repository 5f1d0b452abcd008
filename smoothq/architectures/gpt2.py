"""GPT-2: LayerNorms, biases, learned positions, matrices held transposed."""

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, attention_heads
from .parts import concatenated_values, plain_mlp, weights, writers


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    qkv, o, fc1, fc2 = weights("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    o_site = Site("o", "values", (o,), Rows((concatenated_values(qkv.tensor, heads),), heads))
    up, down = plain_mlp(fc1, fc2, Norm("ln_2.weight"), config.activation_function)
    return BlockGraph(
        (Site("qkv", "stream", (qkv,), Norm("ln_1.weight")), o_site, up, down),
        writers(o_site, down),
    )


def _refuses(config: PretrainedConfig) -> str | None:
    return "it attends to an encoder" if config.add_cross_attention else None


FAMILY = Family(
    ("gpt2",),
    _block,
    layers="h",
    final_norm="ln_f",
    positions="wpe",
    centred=True,
    refuses=_refuses,
)
