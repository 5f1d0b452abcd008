"""Write a checkpoint of random weights in a known model's shapes, without ever holding it.

python scripts/make_random_model.py OUT --shapes llama-3.2-3b
python scripts/make_random_model.py OUT --shapes llama-3.2-3b --layers 48
python scripts/make_random_model.py OUT --shapes tinyllama-1.1b --layers 4 --experts 64

With `--experts` the MLP of each layer is a mixture, stored as such checkpoints are: a tensor for
each matrix of each expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from smoothq.checkpoint.shards import ShardState, ShardWriter

ROWS_ELEMENTS = 1 << 22  # made at a time
CHOSEN = 8  # experts of a token


class Shapes(StrEnum):
    """Models whose shapes can be had."""

    TINYLLAMA = "tinyllama-1.1b"
    LLAMA_32_3B = "llama-3.2-3b"
    LLAMA_31_8B = "llama-3.1-8b"
    LLAMA_31_70B = "llama-3.1-70b"


# vocabulary, hidden, intermediate, layers, heads, key/value heads, head, tied
_SIZES = {
    Shapes.TINYLLAMA: (32000, 2048, 5632, 22, 32, 4, False),
    Shapes.LLAMA_32_3B: (128256, 3072, 8192, 28, 24, 8, True),
    Shapes.LLAMA_31_8B: (128256, 4096, 14336, 32, 32, 8, False),
    Shapes.LLAMA_31_70B: (128256, 8192, 28672, 80, 64, 8, False),
}


def config_of(
    shapes: Shapes, layers: int | None, experts: int | None = None
) -> LlamaConfig | Qwen3MoeConfig:
    """The config of a model's shapes, in bfloat16.

    Args:
        shapes: whose.
        layers: in place of its own number.
        experts: in each layer, in place of its MLP: a token passes CHOSEN of them, which are
            together as wide as that.
    """
    vocabulary, hidden, inner, own, heads, key_value, tied = _SIZES[shapes]
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers or own,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "dtype": torch.bfloat16,
    }
    if experts is None:
        return LlamaConfig(**common)
    routed: dict[str, Any] = {
        "num_experts": experts,
        "num_experts_per_tok": min(CHOSEN, experts),
        "moe_intermediate_size": inner // CHOSEN,
        "head_dim": hidden // heads,
    }
    return Qwen3MoeConfig(**common, **routed)


def random_rows(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """A tensor of normal values of a trained weight's size, row by row; a vector is all ones."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    count = max(1, ROWS_ELEMENTS // shape[1])
    for first in range(0, shape[0], count):
        rows = torch.empty(min(count, shape[0] - first), shape[1], dtype=torch.bfloat16)
        yield rows.normal_(std=shape[1] ** -0.5, generator=generator)


def stored(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes by which checkpoints have a parameter: experts each by themselves."""
    path, _, matrix = name.rpartition(".")
    if len(shape) < 3:
        yield name, shape
        return
    experts, rows, width = shape
    fused = matrix == "gate_up_proj"
    for expert in range(experts):
        for part in ("gate_proj", "up_proj") if fused else (matrix,):
            yield f"{path}.{expert}.{part}.weight", (rows // 2 if fused else rows, width)


def write_random_model(
    directory: Path, config: PretrainedConfig, seed: int = 0, shard_bytes: int = 2 * 10**9
) -> None:
    """Write the checkpoint: shards, index and config."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, ShardState(), shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        for full, shape in stored(name, tuple(parameter.shape)):
            writer.add(full, random_rows(shape, generator), shape, 2 * math.prod(shape))
    writer.finish(directory)
    writer.forget_copied()
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)


def main(
    out: Annotated[Path, typer.Argument(help="Directory to make.")],
    shapes: Annotated[Shapes, typer.Option(help="Whose shapes.")] = Shapes.LLAMA_32_3B,
    layers: Annotated[int | None, typer.Option(help="Layers, in place of its own.")] = None,
    experts: Annotated[int | None, typer.Option(help="In a layer, for its MLP.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write the model."""
    write_random_model(out, config_of(shapes, layers, experts), seed)
    print(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
