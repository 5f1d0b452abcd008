"""Perplexity over non-overlapping windows, the protocol of GPTQ and of the papers after it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..architectures.positions import within_positions
from ..errors import CalibrationError, NumericsError
from ..runtime.offload import running_device

# Logits turned to float32 at a time: 128 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        tokens: predicted tokens, windows × (sequence_length − 1).
        windows: how many were measured.
        sequence_length: tokens a window; the text's length if it is shorter than one window.
        seconds: wall-clock time of the whole measurement.
    """

    perplexity: float
    tokens: int
    windows: int
    sequence_length: int
    seconds: float


def perplexity(
    model: PreTrainedModel,
    tokens: torch.LongTensor,
    sequence_length: int = 2048,
    windows: int | None = None,
    batch_size: int = 1,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Measure a model's perplexity: exp of the mean negative log-likelihood of predicted tokens.

    The text is cut into windows from its start, and each window predicts all of its tokens but the
    first. A last incomplete window is dropped, unless it is the only one.
    Log-softmax is float32 on a few rows of logits at a time and the sum is float64, so that memory
    is bounded by the model's own logits and the batch size changes the result by rounding only.
    The model runs in eval mode and gets its mode back.

    Args:
        model: a causal LM, float or quantized.
        tokens: int64 (1, tokens) on any device, as `data.text.evaluation_tokens` returns them.
        sequence_length: tokens a window; the model's positions where they are fewer.
        windows: at most so many, from the start; None for all.
        batch_size: windows a forward.
        on_window: called after each window with windows done, windows in all, perplexity so far.

    Raises:
        CalibrationError: fewer than 2 tokens, a number out of range, or a model that predicts no
            tokens.
        NumericsError: the loss is NaN or infinite.
    """
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"perplexity needs tokens of shape (1, 2 or more), not {tuple(tokens.shape)}: "
            "give a longer evaluation text"
        )
    if sequence_length < 2 or batch_size < 1 or (windows is not None and windows < 1):
        raise CalibrationError(
            f"perplexity cannot use sequence length {sequence_length}, batch size {batch_size} and "
            f"{'all' if windows is None else windows} windows: "
            "a window needs 2 tokens, the others must be at least 1"
        )
    start = time.perf_counter()
    longest = min(sequence_length, tokens.shape[1])
    grid = windows_of(tokens, within_positions(model, longest, "windows"), windows)
    count, length = grid.shape
    device = running_device(model)

    total = 0.0
    was_training = model.training
    model.train(False)
    try:
        for first in range(0, count, batch_size):
            losses = _window_losses(model, grid[first : first + batch_size].to(device))
            for window, loss in enumerate(losses, start=first):
                if not math.isfinite(loss):
                    raise NumericsError(
                        f"the loss of evaluation window {window} (of {count}, from 0) is {loss}: "
                        "the model's logits hold NaN or Inf; check its weights or use a wider dtype"
                    )
                total += loss
                if on_window is not None:
                    so_far = perplexity_of(total, (window + 1) * (length - 1))
                    on_window(window + 1, count, so_far)
    finally:
        model.train(was_training)
    return Perplexity(
        perplexity=perplexity_of(total, count * (length - 1)),
        tokens=count * (length - 1),
        windows=count,
        sequence_length=length,
        seconds=time.perf_counter() - start,
    )


def windows_of(
    tokens: torch.Tensor, sequence_length: int, windows: int | None = None
) -> torch.Tensor:
    """The windows that perplexity is measured on.

    Args:
        tokens: int64 (1, tokens).
        sequence_length: tokens a window; all tokens where they are fewer.
        windows: at most so many, from the start; None for all complete ones.

    Returns:
        int64 (windows, length), a view of `tokens`.
    """
    length = min(sequence_length, tokens.shape[1])
    count = tokens.shape[1] // length
    if windows is not None:
        count = min(count, windows)
    return tokens[0, : count * length].reshape(count, length)


# no_grad, not inference_mode: what a module derives and keeps on its first call stays usable.
@torch.no_grad()
def _window_losses(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Each window's summed −log softmax(logits)[next token]; windows (batch, length)."""
    logits = getattr(model(input_ids=windows, use_cache=False), "logits", None)
    if logits is None or logits.shape[:-1] != windows.shape or logits.shape[-1] <= windows.max():
        raise CalibrationError(f"{type(model).__name__} predicts no tokens: it has no perplexity")
    return [window_loss(*pair) for pair in zip(logits, windows, strict=True)]


def window_loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """A window's summed negative log-likelihood, in nats, accumulated in float64.

    Args:
        logits: (length, vocabulary), of any float dtype and device.
        window: its tokens, int64 (length,); all but the first are predicted.
    """
    rows, total = max(1, _CHUNK_ELEMENTS // logits.shape[-1]), 0.0
    following = window[1:].to(logits.device)
    for chunk, targets in zip(logits[:-1].split(rows), torch.split(following, rows), strict=True):
        losses = F.cross_entropy(chunk.float(), targets, reduction="none")
        # Summed on the CPU: not every accelerator has float64.
        total += losses.cpu().double().sum().item()
    return total


def perplexity_of(loss: float, tokens: int) -> float:
    """exp(loss / tokens) of a summed loss; infinity where math.exp would raise OverflowError."""
    return torch.tensor(loss / tokens, dtype=torch.float64).exp().item()
