"""Smoothing: channels of a site's input are divided by s, and its readers multiplied by s.

s_j = max_t |X_tj|^α / max_n |W_nj|^(1−α);  X ← X / s,  W ← W · s. The division is folded into the
producer of X: a norm's weight, rows of up_proj, or rows of v_proj. All readers of a site share one
divisor. Source: SmoothQuant (arXiv 2211.10438), eq. 4; at up→down before a Hadamard
it is SmoothRot (arXiv 2506.05413), section 3 (with max |W|, which its released code omits).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architectures import (
    Heads,
    Norm,
    Rows,
    Site,
)
from .chunks import columns_of, rows_of

SMALLEST_DIVISOR = 1e-5  # SmoothQuant's clamp, keeps dead channels finite


def _per_kv_channel(channels: Tensor, heads: Heads) -> Tensor:
    """The maximum over query heads of one value head: (query heads · dim,) → (kv heads · dim,)."""
    shared = channels.reshape(heads.key_value, heads.query // heads.key_value, heads.dim)
    return shared.amax(1).flatten()


def repeat_over_queries(channels: Tensor, heads: Heads) -> Tensor:
    """Each value head repeated for its query heads: (kv heads · dim,) → (query heads · dim,)."""
    per_head = channels.reshape(heads.key_value, 1, heads.dim)
    return per_head.expand(-1, heads.query // heads.key_value, -1).flatten()


def smoothing_divisor(input_maxima: Tensor, weight_maxima: Tensor, alpha: float) -> Tensor:
    """s = max|X|^α / max|W|^(1−α), float64 (K,), at least 1e-5; 1 where a channel is dead.

    Args:
        input_maxima: max_t |X_tj|, float (K,).
        weight_maxima: max_n |W_nj| over all readers, float (K,).
        alpha: migration strength, in [0, 1].
    """
    x, w = input_maxima.double(), weight_maxima.double()
    divisor = (x**alpha / w ** (1 - alpha)).clamp(min=SMALLEST_DIVISOR)
    return torch.where((x > 0) & (w > 0), divisor, torch.ones_like(divisor))


def smooth(
    block: nn.Module,
    site: Site,
    input_maxima: Tensor,
    alpha: float,
    norm_dtype: torch.dtype = torch.float64,
) -> None:
    """Divide a site's input by s where it is produced, and multiply its readers by s.

    In place, in float64. The output of the block does not change.

    Args:
        block: linearized.
        site: with a producer.
        input_maxima: max_t |X_tj|, float (K,).
        alpha: migration strength, in [0, 1].
        norm_dtype: that a norm's weight will be stored in. If the producer is a norm, its divided
            weight is rounded to that dtype first, and s computed from it, so that norm and readers
            cancel exactly.

    Raises:
        ValueError: the site has no producer.
    """
    if site.producer is None:
        raise ValueError(f"site '{site.name}' has no producer that could absorb a divisor")
    readers = [reader.view(block) for reader in site.all_readers]
    chunks = [rows for matrix in readers for rows in rows_of(matrix)]
    weight_maxima = torch.stack([rows.abs().amax(0).double() for rows in chunks]).amax(0)
    producer = site.producer
    if isinstance(producer, Rows) and producer.heads is not None:
        shared = smoothing_divisor(
            _per_kv_channel(input_maxima, producer.heads),
            _per_kv_channel(weight_maxima, producer.heads),
            alpha,
        )
        divisor = repeat_over_queries(shared, producer.heads)
    else:
        shared = divisor = smoothing_divisor(input_maxima, weight_maxima, alpha)
        if isinstance(producer, Norm):
            norm = block.get_parameter(producer.weight).data.double() + producer.offset
            limits = torch.finfo(norm_dtype)  # beyond these the norm would be stored as 0 or Inf
            size = (norm / divisor).abs().clamp(limits.tiny, limits.max)
            signed = size * torch.where(norm < 0, -1.0, 1.0)
            stored = (signed - producer.offset).to(norm_dtype).double() + producer.offset
            kept = torch.where(norm * stored > 0, norm / stored, torch.ones_like(norm))
            shared = divisor = torch.where(norm != 0, kept, divisor)
    for rows in chunks:
        rows.copy_(rows.double() * divisor)
    _divide_producer(block, producer, shared)


def _divide_producer(block: nn.Module, producer: Norm | Rows, divisor: Tensor) -> None:
    if isinstance(producer, Norm):
        weight, bias = block.get_parameter(producer.weight).data, producer.bias_view(block)
        weight.copy_((weight.double() + producer.offset) / divisor - producer.offset)
        if bias is not None:
            bias.copy_(bias.double() / divisor)
        return
    matrices = [ref.view(block) for ref in producer.refs]
    parts = divisor.split([len(matrix) for matrix in matrices])
    for ref, rows, part in zip(producer.refs, matrices, parts, strict=True):
        for columns in columns_of(rows):
            columns.copy_(columns.double() / part.unsqueeze(-1))
        bias = ref.bias_view(block)
        if bias is not None:
            bias.copy_(bias.double() / part)
