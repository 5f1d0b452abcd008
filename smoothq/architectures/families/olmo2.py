"""OLMo 2: linears read the residual stream itself; the only norms are before the additions."""

from transformers import PretrainedConfig

from ..graph import BlockGraph, Family
from ..parts import gated_mlp, separate_attention


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    return BlockGraph(
        (*separate_attention(config, None), *gated_mlp(None)),
        residual_writers=(),
    )


FAMILY = Family(("olmo2",), _block)
