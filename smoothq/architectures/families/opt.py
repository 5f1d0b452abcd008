"""OPT: LayerNorms, biases, a plain MLP, learned positions."""

from transformers import PretrainedConfig

from ..graph import BlockGraph, Family, Norm
from ..parts import (
    plain_mlp,
    separate_attention,
    weights,
    writers,
)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = separate_attention(config, Norm("self_attn_layer_norm.weight"), output="out_proj")
    fc1, fc2 = weights("fc1", "fc2")
    norm = Norm("final_layer_norm.weight")
    up, down = plain_mlp(fc1, fc2, norm, config.activation_function)
    return BlockGraph((qkv, o, up, down), writers(o, down))


def _refuses(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        return (
            "OPT-350m and its like normalise after the additions and project their embeddings, "
            "which no transform passes"
        )
    if not config.layer_norm_elementwise_affine:
        return "its LayerNorms have no weight to fold anything into"
    return None


FAMILY = Family(
    ("opt",),
    _block,
    final_norm="final_layer_norm",
    positions="embed_positions",
    centred=True,
    flattens=True,
    refuses=_refuses,
)
