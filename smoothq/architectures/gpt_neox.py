"""GPT-NeoX and Pythia: LayerNorms, attention and MLP side by side, q, k and v by head."""

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, attention_heads
from .parts import interleaved_values, plain_mlp, weights, writers


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    qkv, o = weights("attention.query_key_value", "attention.dense")
    values = interleaved_values(qkv.tensor, heads)
    o_site = Site("o", "values", (o,), Rows(values, heads))
    fc1, fc2 = weights("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    up, down = plain_mlp(fc1, fc2, Norm("post_attention_layernorm.weight"), config.hidden_act)
    return BlockGraph(
        (Site("qkv", "stream", (qkv,), Norm("input_layernorm.weight")), o_site, up, down),
        writers(o_site, down),
    )


FAMILY = Family(("gpt_neox",), _block, final_norm="final_layer_norm", centred=True)
