"""Teach smoothq a model family that it has no file for, and prove the wiring before using it.

    python examples/add_family.py

Granite is wired as Llama is. The model here is a tiny random one, so nothing is downloaded.
"""

import torch
from transformers import AutoModelForCausalLM, GraniteConfig, PretrainedConfig

from smoothq import (
    BlockGraph,
    Family,
    Norm,
    gated_mlp,
    preset,
    prove_family,
    quantize,
    register_family,
    separate_attention,
    writers,
)


def block(config: PretrainedConfig, index: int) -> BlockGraph:
    """The sites of a block in the order of execution, and who writes the residual stream."""
    qkv, o = separate_attention(config, Norm("input_layernorm.weight"))
    gate_up, down = gated_mlp(Norm("post_attention_layernorm.weight"))
    return BlockGraph((qkv, o, gate_up, down), writers(o, down))


family = Family(("granite",), block)
config = GraniteConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
for claim, deviation in prove_family(family, config).items():
    print(f"{claim}: logits moved by {deviation:.1e}")
register_family(family)

model = AutoModelForCausalLM.from_config(config)
data = torch.randint(256, (8, 32))
quantized = quantize(model, preset("w4a8").edit(tuning__steps=2), data=data)
print(quantized(data[:1]).logits.shape)
