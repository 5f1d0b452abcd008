"""GPT-NeoX and Pythia: LayerNorms, attention and MLP side by side, q, k and v by head."""

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
    fused, dense = weights("attention.query_key_value", "attention.dense")
    values = interleaved_values(fused.tensor, heads)
    qkv, o = fused_attention(fused, dense, values, heads, Norm("input_layernorm.weight"))
    fc1, fc2 = weights("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    up, down = plain_mlp(fc1, fc2, Norm("post_attention_layernorm.weight"), config.hidden_act)
    return BlockGraph((qkv, o, up, down), writers(o, down))


FAMILY = Family(("gpt_neox",), _block, final_norm="final_layer_norm", centred=True)
