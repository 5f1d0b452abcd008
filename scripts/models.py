"""Models with random weights, float and quantized: speed does not depend on what weights say."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from smoothq import Recipe
from smoothq.kernels import largest_multiplier
from smoothq.modules import InputQuantizer, QuantizedEmbedding, QuantizedLinear
from smoothq.modules.prepare import prepare
from smoothq.modules.quantized_embedding import row_grid
from smoothq.plan.install import install
from smoothq.plan.resolve import make_plan
from smoothq.rounding.grid import Grid, IntegerGrid, QuantizedWeight, Scales
from smoothq.rounding.rtn import round_to_nearest

Size = Literal["tiny", "135m", "1.1b", "8b"]


def config_of(size: Size) -> LlamaConfig:
    """The shapes of a tiny model, SmolLM2-135M, TinyLlama-1.1B and Llama-3-8B."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
    )
    values: dict[Size, tuple[int, ...]] = {
        "tiny": (256, 128, 384, 2, 4, 2, True),
        "135m": (49152, 576, 1536, 30, 9, 3, True),
        "1.1b": (32000, 2048, 5632, 22, 32, 4, False),
        "8b": (128256, 4096, 14336, 32, 32, 8, False),
    }
    fields: dict[str, Any] = dict(zip(names, values[size], strict=True))
    return LlamaConfig(**fields, max_position_embeddings=8192)


@dataclass(frozen=True)
class Where:
    """The device, and the dtype of all that is not quantized there."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def here(cls) -> Where:
        """A GPU in bfloat16 if there is one, else the CPU in float32."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.bfloat16)
        return cls(torch.device("cpu"), torch.float32)

    @property
    def name(self) -> str:
        """What the device is called."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        found = proc_field("cpuinfo", "model name") or platform.machine()
        return f"{found}, {torch.backends.cpu.get_cpu_capability()}"

    @property
    def dtype_name(self) -> str:
        """Of the dtype: float32, bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes that can still be taken; 0 where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0]
        return proc_bytes("meminfo", "MemAvailable")


def proc_field(file: str, name: str) -> str | None:
    """A field of one of Linux's /proc files; None elsewhere."""
    path = Path("/proc") / file
    text = path.read_text() if path.is_file() else ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else None


def proc_bytes(file: str, name: str) -> int:
    """A field that counts kilobytes, in bytes; 0 if there is none."""
    return int((proc_field(file, name) or "0").split()[0]) * 1024


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.eval()
    return model


def fill_floats(model: PreTrainedModel, where: Where) -> None:
    """Give every parameter that is still on the meta device random values, and the rest a home."""
    for module in list(model.modules()):
        for name, like in list(module.named_parameters(recurse=False)):
            values = torch.ones(like.shape, dtype=where.dtype, device=where.device)
            if like.dim() > 1:
                values.normal_(std=like.shape[-1] ** -0.5)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    # Its frequencies are no parameters: they are reckoned when it is made.
    rotary = model.get_submodule("model.rotary_emb")
    model.set_submodule("model.rotary_emb", type(rotary)(model.config).to(where.device))


def random_weight(
    shape: tuple[int, int], grid: Grid, stored: dict[str, Tensor], device: torch.device
) -> QuantizedWeight:
    """Codes and scales that a grid allows, of about the size of a trained weight's."""
    if not isinstance(grid, IntegerGrid):
        weight = torch.randn(shape, device=device) * shape[1] ** -0.5
        return round_to_nearest(weight, grid.unclipped())
    codes = torch.randint(grid.lowest, grid.highest + 1, shape, dtype=torch.int8, device=device)
    step, multiplier = shape[1] ** -0.5 / grid.highest, None
    if "weight_multiplier" in stored:
        largest, size = largest_multiplier(grid.bits), stored["weight_multiplier"].shape
        multiplier = torch.randint(1, largest + 1, size, dtype=torch.int8, device=device)
        step /= largest
    scale = step * (0.5 + torch.rand(stored["weight_scale"].shape, device=device))
    return QuantizedWeight(codes, Scales(scale.to(stored["weight_scale"].dtype), multiplier))


def random_float_model(config: PretrainedConfig, where: Where) -> PreTrainedModel:
    """A float model with random weights."""
    model = skeleton(config, where.dtype)
    fill_floats(model, where)
    return model


def random_quantized_model(
    config: PretrainedConfig, recipe: Recipe, where: Where
) -> PreTrainedModel:
    """A model with the modules that a recipe asks for, filled with random codes and scales."""
    model = skeleton(config, where.dtype)
    install(model, make_plan(model, recipe))
    fill_floats(model, where)
    for module in model.modules():
        if isinstance(module, InputQuantizer):
            module.to(where.device)
        elif isinstance(module, QuantizedEmbedding):
            module.like = torch.empty(0, dtype=where.dtype, device=where.device)
            shape = (module.num_embeddings, module.embedding_dim)
            stored = {"weight_scale": module.weight_scale}
            module.set_weight(random_weight(shape, row_grid(shape[1]), stored, where.device))
        elif isinstance(module, QuantizedLinear):
            bias, spec = None, module.spec
            shape = (spec.out_features, spec.in_features)
            if module.bias is not None:
                bias = torch.zeros(module.bias.shape, dtype=where.dtype, device=where.device)
            weight = random_weight(shape, spec.grid, spec.tensors(), where.device)
            module.set_weight(weight, bias)
    prepare(model)
    return model
