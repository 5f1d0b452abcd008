"""Llama and the families that share its wiring: separate q, k, v, gate and up linears."""

from transformers import PretrainedConfig

from ..graph import BlockGraph, Family, Norm
from ..parts import gated_mlp, separate_attention, writers


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = separate_attention(config, Norm("input_layernorm.weight"))
    gate_up, down = gated_mlp(Norm("post_attention_layernorm.weight"))
    return BlockGraph((qkv, o, gate_up, down), writers(o, down))


FAMILY = Family(("llama", "mistral", "qwen2", "qwen3"), _block)
