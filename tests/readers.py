"""Llamas whose code reads the weight of a linear itself, as the code of some families does."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


class AsksDtype(LlamaMLP):
    """Casts what it hands over to a weight's dtype and device, and asks for its size."""

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj.weight
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        assert down.shape[1] == inner.shape[-1]
        return self.down_proj(inner.to(down.dtype).to(down.device).type_as(down)).to(x.dtype)


class ReadsDown(LlamaMLP):
    """Multiplies by `down_proj.weight` without calling `down_proj`."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.act_fn(self.gate_proj(x)) * self.up_proj(x)) @ self.down_proj.weight.T


class ReadsUp(LlamaMLP):
    """Calls `up_proj` and reads a row of its weight through `.data` as well."""

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x) + self.up_proj.weight.data[0, 0]
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


class Halved(nn.Linear):
    """A linear by its class that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class HasHalved(LlamaMLP):
    """Its `down_proj` is no plain linear."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.down_proj.__class__ = Halved


READERS = {
    "asks_dtype": (AsksDtype, None),
    "reads_down": (ReadsDown, "mlp.down_proj"),
    "reads_up": (ReadsUp, "mlp.up_proj"),
    "has_halved": (HasHalved, "mlp.down_proj"),
}


def _define(name: str, mlp: type[LlamaMLP]) -> type[LlamaForCausalLM]:
    config = type(f"{name.title()}Config", (LlamaConfig,), {"model_type": name})

    class Reader(LlamaForCausalLM):
        config_class = config

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = mlp(config)

    AutoConfig.register(name, config)
    AutoModelForCausalLM.register(config, Reader)
    return Reader


_CLASSES = {name: _define(name, mlp) for name, (mlp, _) in READERS.items()}


def reader(name: str) -> LlamaForCausalLM:
    """A tiny random model of one of these types, in float32."""
    torch.manual_seed(0)
    model = _CLASSES[name](_CLASSES[name].config_class(**SIZES)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model
