"""Mixtral: Llama's attention, and experts held as 3-D parameters with gate and up fused."""

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, WeightRef, attention_heads


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    q, k, v, o = (WeightRef(f"self_attn.{part}_proj.weight") for part in "qkvo")
    width = config.intermediate_size
    experts = range(config.num_local_experts)

    def gate_up(expert: int, first: int) -> WeightRef:
        rows = (first, first + width)
        return WeightRef("mlp.experts.gate_up_proj", rows=rows, expert=expert)

    gates = tuple(gate_up(expert, 0) for expert in experts)
    ups = tuple(gate_up(expert, width) for expert in experts)
    downs = tuple(WeightRef("mlp.experts.down_proj", expert=expert) for expert in experts)
    router = WeightRef("mlp.gate.weight")
    return BlockGraph(
        sites=(
            Site("qkv", (q, k, v), Norm("input_layernorm.weight")),
            Site("o", (o,), Rows(v, attention_heads(config))),
            Site("gate_up", gates + ups, Norm("post_attention_layernorm.weight"), (router,)),
            *(Site(f"down.{e}", (downs[e],), Rows(ups[e])) for e in experts),
        ),
        residual_writers=(o, *downs),
    )


FAMILY = Family(
    ("mixtral",),
    _block,
    unquantizable="its experts are 3-D parameters, which no quantized module runs yet",
)
