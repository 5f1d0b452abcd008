"""The size classes that GPU kernels are tuned for, and a run of a model through them."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import torch

# Decode steps differ by every doubling; a prompt's best tile hardly changes by a factor of four.
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 128, 512, 2048, 8192)


def token_bucket(tokens: int) -> int:
    """The size class of a number of tokens: the next of TOKEN_BUCKETS, or the last."""
    return TOKEN_BUCKETS[bisect_left(TOKEN_BUCKETS, min(tokens, TOKEN_BUCKETS[-1]))]


@torch.no_grad()
def run_through(model: Any, device: torch.device, tokens: Iterable[int]) -> None:
    """Run a causal LM of transformers on prompts of several lengths, each with a decode step.

    Args:
        model: the model.
        device: of its inputs.
        tokens: of a prompt; few are a batch of single tokens, more than the model has positions
            for are several sequences.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asks = inspect.signature(model.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in asks else {}
    for count in tokens:
        batch, length = count, 1
        if count > 16:
            length = min(count, longest or count)
            batch = count // length
        ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        if length == 1:
            model(input_ids=ids, use_cache=False, **last)
            continue
        # The decode step reads `length` tokens, which are then of the prompt's size class.
        prompt = model(input_ids=ids[:, 1:], use_cache=True, **last)
        model(input_ids=ids[:, :1], past_key_values=prompt.past_key_values, use_cache=True, **last)
