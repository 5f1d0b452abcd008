"""What a quantized KV cache and int8 attention cost in perplexity, the weights left in float.

python scripts/kv_cache.py --model DIR --text wiki.test.raw --windows 4
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothq import Recipe, perplexity
from smoothq.data.text import TextSource, evaluation_tokens
from smoothq.plan.install import install_attention
from smoothq.plan.resolve import make_plan

SETTINGS: dict[str, dict[str, Any]] = {
    "float": {},
    "8 bits": {"kv_cache": {"bits": 8}},
    "4 bits": {"kv_cache": {"bits": 4}},
    "4 bits, first 4 tokens float": {"kv_cache": {"bits": 4, "float_tokens": 4}},
    "4 bits, a group a head": {"kv_cache": {"bits": 4, "group_size": "head"}},
    "4 bits, keys not rotated": {"kv_cache": {"bits": 4, "rotate_keys": False}},
    "float, int8 attention": {"attention": "int8"},
    "float, int8-centred attention": {"attention": "int8-centred"},
    "8 bits, int8 attention": {"kv_cache": {"bits": 8}, "attention": "int8"},
}


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id of a float model.")],
    text: Annotated[str, typer.Option(help="Text to evaluate on.")] = "wikitext2",
    windows: Annotated[int, typer.Option(help="At most this many windows.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
) -> None:
    """Print a row of the table for each setting: bits an element, perplexity, what it costs."""
    tokens = evaluation_tokens(AutoTokenizer.from_pretrained(model), TextSource(text))
    base = None
    for name, fields in SETTINGS.items():
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        plan = make_plan(loaded, Recipe(**fields))
        install_attention(loaded, plan)
        found = perplexity(loaded, tokens, sequence_length, windows).perplexity
        base = base or found
        cost = 100 * (found / base - 1)
        print(f"| {name} | {plan.bits.cached:.2f} | {found:.2f} | {cost:+.2f}% |", flush=True)


if __name__ == "__main__":
    typer.run(main)
