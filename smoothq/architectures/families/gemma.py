"""Gemma 2 and 3: norms that multiply by (1 + w), and norms before the residual additions."""

from transformers import PretrainedConfig

from ..graph import BlockGraph, Family, Norm
from ..parts import gated_mlp, separate_attention


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = separate_attention(config, Norm("input_layernorm.weight", offset=1))
    gate_up, down = gated_mlp(Norm("pre_feedforward_layernorm.weight", offset=1))
    return BlockGraph((qkv, o, gate_up, down), residual_writers=())


FAMILY = Family(("gemma2", "gemma3_text"), _block)
