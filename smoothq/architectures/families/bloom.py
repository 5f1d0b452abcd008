"""BLOOM: LayerNorms, biases, ALiBi, q, k and v of each head side by side, a norm at the entry."""

from transformers import PretrainedConfig

from ..graph import (
    BlockGraph,
    Family,
    Norm,
    attention_heads,
)
from ..parts import (
    fused_attention,
    interleaved_values,
    plain_mlp,
    weights,
    writers,
)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    fused, dense = weights("self_attention.query_key_value", "self_attention.dense")
    values = interleaved_values(fused.tensor, heads)
    qkv, o = fused_attention(fused, dense, values, heads, Norm("input_layernorm.weight"))
    fc1, fc2 = weights("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    up, down = plain_mlp(fc1, fc2, Norm("post_attention_layernorm.weight"), "gelu")
    return BlockGraph((qkv, o, up, down), writers(o, down))


def _refuses(config: PretrainedConfig) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "its residual stream is what its norms put out, which no rotation or fusion passes"
    if config.slow_but_exact and config.pretraining_tp > 1:
        return "slow_but_exact multiplies slices of a weight; set it to false in config.json"
    return None


FAMILY = Family(
    ("bloom",),
    _block,
    layers="h",
    final_norm="ln_f",
    entry_norm="word_embeddings_layernorm",
    centred=True,
    sums_at_entry=False,
    refuses=_refuses,
)
