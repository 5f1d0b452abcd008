"""Falcon: LayerNorms, attention and MLP side by side or not, three layouts of q, k and v."""

from dataclasses import replace

from transformers import PretrainedConfig

from ..graph import (
    BlockGraph,
    Family,
    Heads,
    Norm,
    Rows,
    Site,
    attention_heads,
)
from ..parts import (
    interleaved_values,
    plain_mlp,
    weights,
    writers,
)


def _heads(config: PretrainedConfig) -> Heads:
    heads = attention_heads(config)
    if config.new_decoder_architecture:
        return replace(heads, key_value=config.num_kv_heads)
    return replace(heads, key_value=1 if config.multi_query else heads.query)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = weights("self_attention.query_key_value", "self_attention.dense")
    fc1, fc2 = weights("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    heads = _heads(config)
    o_site = Site("o", "attention", (o,), Rows(interleaved_values(qkv.tensor, heads), heads))
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    norm_count = getattr(config, "num_ln_in_parallel_attn", None)
    two_in_parallel = norm_count == 2 or (norm_count is None and config.new_decoder_architecture)
    if config.parallel_attn and two_in_parallel:
        norms = ("ln_attn.weight", "ln_mlp.weight")
    up, down = plain_mlp(fc1, fc2, Norm(norms[1]), config.activation)
    if config.parallel_attn and not two_in_parallel:
        both = Site("qkv_up", "residual", (qkv, fc1), Norm(norms[0]))
        return BlockGraph((both, o_site, down), writers(o_site, down))
    qkv_site = Site("qkv", "residual", (qkv,), Norm(norms[0]))
    return BlockGraph((qkv_site, o_site, up, down), writers(o_site, down))


FAMILY = Family(("falcon",), _block, layers="h", final_norm="ln_f", centred=True)
