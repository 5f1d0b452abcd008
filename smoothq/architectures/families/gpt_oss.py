"""GPT-OSS in bfloat16: attention sinks, experts with biases, gate and up rows in turn.

Its gated product clamps up and adds one to it, so that no divisor passes up→down.
"""

from transformers import PretrainedConfig

from ..graph import (
    BlockGraph,
    Family,
    Norm,
    Site,
)
from ..parts import (
    experts,
    separate_attention,
    weights,
    writers,
)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = separate_attention(config, Norm("input_layernorm.weight"))
    readers, downs = experts("mlp.experts", config.num_local_experts, None)
    norm = Norm("post_attention_layernorm.weight")
    gate_up = Site("gate_up", "residual", readers, norm, weights("mlp.router"))
    return BlockGraph((qkv, o, gate_up, *downs), writers(o, *downs))


FAMILY = Family(("gpt_oss",), _block, flattens=True)
