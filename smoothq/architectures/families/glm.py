"""GLM-4: Llama's attention, gate and up in one linear; the 0414 models add post-norms."""

from transformers import PretrainedConfig

from ..graph import BlockGraph, Family, Norm
from ..parts import fused_gated_mlp, separate_attention, writers


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = separate_attention(config, Norm("input_layernorm.weight"))
    gate_up, down = fused_gated_mlp(config, Norm("post_attention_layernorm.weight"))
    post_norms = config.model_type == "glm4"
    return BlockGraph((qkv, o, gate_up, down), () if post_norms else writers(o, down))


FAMILY = Family(("glm", "glm4"), _block)
