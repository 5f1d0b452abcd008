"""Qwen2-MoE and Qwen3-MoE: Llama's attention, routed experts, in Qwen2 a shared one beside them."""

from transformers import PretrainedConfig

from ..graph import (
    BlockGraph,
    Family,
    Norm,
    Rows,
    Site,
)
from ..parts import (
    experts,
    gated_mlp,
    separate_attention,
    weights,
    writers,
)


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    qkv, o = separate_attention(config, Norm("input_layernorm.weight"))
    norm = Norm("post_attention_layernorm.weight")
    every = config.decoder_sparse_step
    if index in config.mlp_only_layers or config.num_experts == 0 or (index + 1) % every:
        gate_up, down = gated_mlp(norm)
        return BlockGraph((qkv, o, gate_up, down), writers(o, down))
    routed, downs = experts(
        "mlp.experts", config.num_experts, slice(config.moe_intermediate_size, None)
    )
    router = weights("mlp.gate")
    if config.model_type == "qwen3_moe":
        routers_input = Site("gate_up", "residual", routed, norm, router)
        return BlockGraph((qkv, o, routers_input, *downs), writers(o, *downs))
    gate, up, shared = weights(*(f"mlp.shared_expert.{m}_proj" for m in ("gate", "up", "down")))
    floats = router + weights("mlp.shared_expert_gate")
    both = Site("gate_up", "residual", (gate, up, *routed), norm, floats)
    downs = (Site("down", "mlp", (shared,), Rows((up,))), *downs)
    return BlockGraph((qkv, o, both, *downs), writers(o, *downs))


FAMILY = Family(("qwen2_moe", "qwen3_moe"), _block, flattens=True)
