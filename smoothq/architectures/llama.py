"""Llama and the families that share its wiring: separate q, k, v, gate and up linears."""

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, WeightRef, attention_heads


def _block(config: PretrainedConfig, index: int) -> BlockGraph:
    # Qwen2 always has biases at q, k and v; Mistral never has any, whatever its config says.
    attention_bias = config.model_type != "mistral" and getattr(config, "attention_bias", False)
    qkv_bias = config.model_type == "qwen2" or attention_bias
    o_bias = config.model_type != "qwen2" and attention_bias
    mlp_bias = getattr(config, "mlp_bias", False)

    def linear(name: str, bias: bool) -> WeightRef:
        return WeightRef(f"{name}.weight", f"{name}.bias" if bias else None)

    q, k, v = (linear(f"self_attn.{part}_proj", qkv_bias) for part in "qkv")
    o = linear("self_attn.o_proj", o_bias)
    gate, up, down = (linear(f"mlp.{part}_proj", mlp_bias) for part in ("gate", "up", "down"))
    return BlockGraph(
        sites=(
            Site("qkv", (q, k, v), Norm("input_layernorm.weight")),
            Site("o", (o,), Rows(v, attention_heads(config))),
            Site("gate_up", (gate, up), Norm("post_attention_layernorm.weight")),
            Site("down", (down,), Rows(up)),
        ),
        residual_writers=(o, down),
    )


FAMILY = Family(("llama", "mistral", "qwen2", "qwen3"), _block)
