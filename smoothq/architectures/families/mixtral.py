"""Mixtral: Llama's attention, and routed experts with gate and up fused."""

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
    readers, downs = experts(
        "mlp.experts", config.num_local_experts, slice(config.intermediate_size, None)
    )
    norm = Norm("post_attention_layernorm.weight")
    gate_up = Site("gate_up", "residual", readers, norm, weights("mlp.gate"))
    return BlockGraph((qkv, o, gate_up, *downs), writers(o, *downs))


FAMILY = Family(("mixtral",), _block, flattens=True)
