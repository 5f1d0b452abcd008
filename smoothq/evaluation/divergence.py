"""How far a quantized model's predictions are from another's, and from its own token by token."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationError

_CHUNK_TOKENS = 256  # tokens whose log-probabilities are held at a time, of both models


@dataclass(frozen=True)
class Agreement:
    """How two predictions of the same tokens compare, averaged over all of them.

    divergence: KL(reference ‖ model) in nats a token, at least zero. top1: share of tokens at which
    both find the same next token most likely. tokens: how many were compared.
    """

    divergence: float
    top1: float
    tokens: int


def check_vocabularies(sizes: Mapping[str, int]) -> None:
    """Raise CalibrationError where models predict tokens of different vocabularies.

    sizes: logits of each model, by its name, the reference first.
    """
    (first, wanted), *others = sizes.items()
    for name, size in others:
        if size != wanted:
            raise CalibrationError(
                f"{name} predicts {size} tokens and {first} {wanted}: predictions are compared "
                "between models of one vocabulary"
            )


def logits_count(model: PreTrainedModel) -> int:
    """How many tokens a model predicts: rows of its head."""
    head = model.get_output_embeddings()
    out_features = getattr(head, "out_features", None)
    return int(out_features or model.config.get_text_config(decoder=True).vocab_size)


@torch.no_grad()
def agreement(model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor) -> Agreement:
    """Compare the predictions of two models that share a vocabulary, window by window.

    windows: int64 (windows, length). Both models run in eval mode. Raises CalibrationError for
    windows of another shape.
    """
    if windows.dim() != 2 or not windows.numel():
        raise CalibrationError(f"windows must be (windows, length), not {tuple(windows.shape)}")
    pairs = (
        (logits_of(model, window.unsqueeze(0)), logits_of(reference, window.unsqueeze(0)))
        for window in windows
    )
    return _compared(pairs, windows.numel())


@torch.no_grad()
def prefill_and_decode(model: PreTrainedModel, tokens: Tensor) -> Agreement:
    """Compare a model's predictions token by token, through its cache, with those of one prefill.

    tokens: int64 (1, length). The prefill is the reference. A causal recipe differs by float
    rounding only.
    """
    whole = logits_of(model, tokens)
    cache, steps = None, []
    for token in tokens.split(1, dim=1):
        output = model(input_ids=token.to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits[0].float())
    return _compared([(torch.cat(steps), whole)], tokens.numel())


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of one window, int64 (1, length) → float32 (length, vocabulary)."""
    logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits[0]
    return logits.float()


def summed_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Σ KL(p ‖ q) over tokens, in nats; log-probabilities, float32 (tokens, vocabulary)."""
    # Summed on the CPU: not every accelerator has float64.
    return log_p.exp().mul_(log_p - log_q).sum(-1).cpu().double().sum().item()


def _compared(pairs: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Agreement:
    divergence, same = 0.0, 0
    for logits, reference in pairs:
        chunks = zip(
            logits.split(_CHUNK_TOKENS),
            reference.to(logits.device).split(_CHUNK_TOKENS),
            strict=True,
        )
        for ours, theirs in chunks:
            log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
            divergence += summed_divergence(log_p, log_q)
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return Agreement(divergence / tokens, same / tokens, tokens)
