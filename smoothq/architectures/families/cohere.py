"""Cohere: attention and MLP side by side behind one LayerNorm without a bias."""

from transformers import PretrainedConfig

from ..graph import (
    BlockGraph,
    Family,
    Norm,
    Site,
)
from ..parts import gated_mlp, separate_attention, writers


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    norm = Norm("input_layernorm.weight")
    qkv, o = separate_attention(config, norm)
    gate_up, down = gated_mlp(norm)
    both = Site("qkv_gate_up", "residual", qkv.readers + gate_up.readers, norm)
    return BlockGraph((both, o, down), writers(o, down))


FAMILY = Family(("cohere",), _block, centred=True)
