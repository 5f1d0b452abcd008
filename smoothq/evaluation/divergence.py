"""KL divergence and top-1 agreement: of two models, and of one model's decode and prefill."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..runtime.offload import running_device

_CHUNK_TOKENS = 256  # tokens whose log-probabilities are in memory at a time, of both models


@dataclass(frozen=True)
class Agreement:
    """How closely two models predict the same tokens, averaged over all of them.

    Attributes:
        divergence: KL(reference ‖ model) in nats a token, at least zero.
        top1: share of tokens at which both have the same most likely next token, from 0 to 1.
        tokens: how many were compared.
    """

    divergence: float
    top1: float
    tokens: int


def check_vocabularies(sizes: Mapping[str, int]) -> None:
    """Check that models predict tokens of one vocabulary, by its size.

    Args:
        sizes: number of logits by model name, the reference first.

    Raises:
        CalibrationError: a model has another number of logits than the reference.
    """
    (first, wanted), *others = sizes.items()
    for name, size in others:
        if size != wanted:
            raise CalibrationError(
                f"{name} predicts {size} tokens and {first} {wanted}: predictions are compared "
                "between models of one vocabulary"
            )


def logits_count(model: PreTrainedModel) -> int:
    """The size of a model's output vocabulary: rows of its head."""
    head = model.get_output_embeddings()
    out_features = getattr(head, "out_features", None)
    return int(out_features or model.config.get_text_config(decoder=True).vocab_size)


@torch.no_grad()
def agreement(model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor) -> Agreement:
    """Compare the predictions of two models that share a vocabulary, window by window.

    Args:
        model: the model that is judged, in eval mode.
        reference: the model that it is compared with, in eval mode; may be on another device.
        windows: int64 (windows, length).

    Raises:
        CalibrationError: `windows` is of another shape, or empty.
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
    """Compare decoding token by token through the KV cache with one prefill, the reference.

    With a causal recipe the two differ by float rounding only.

    Args:
        model: in eval mode.
        tokens: int64 (1, length).
    """
    whole = logits_of(model, tokens)
    cache, steps = None, []
    for token in tokens.to(running_device(model)).split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits[0].float())
    return _compared([(torch.cat(steps), whole)], tokens.numel())


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of one window: tokens int64 (1, length) → float32 (length, vocabulary)."""
    logits: Tensor = model(input_ids=tokens.to(running_device(model)), use_cache=False).logits[0]
    return logits.float()


def summed_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Σ KL(p ‖ q) over tokens, in nats.

    Args:
        log_p: log-probabilities of the reference, float32 (tokens, vocabulary).
        log_q: log-probabilities of the model, of the same shape and device.
    """
    # Summed on the CPU: not every accelerator has float64.
    return log_p.exp().mul_(log_p - log_q).sum(-1).cpu().double().sum().item()


def _compared(pairs: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Agreement:
    """Agreement over pairs of logits (model, reference), float32 (length, vocabulary) each."""
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
