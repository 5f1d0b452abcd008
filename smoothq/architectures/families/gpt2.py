"""GPT-2: LayerNorms, biases, learned positions, matrices held transposed."""

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
    plain_mlp,
    weights,
    writers,
)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    heads = attention_heads(config)
    fused, proj, fc1, fc2 = weights("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    values = (concatenated_values(fused.tensor, heads),)
    qkv, o = fused_attention(fused, proj, values, heads, Norm("ln_1.weight"))
    up, down = plain_mlp(fc1, fc2, Norm("ln_2.weight"), config.activation_function)
    return BlockGraph((qkv, o, up, down), writers(o, down))


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
