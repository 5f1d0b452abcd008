"""All experts of a layer multiplied at once, in place of one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import QuantizedInput

# An input's codes and scale do not depend on the other rows: by its token alone, and by what
# calibration has left.
_BY_ROW = ("token", "smooth_token")
_CALIBRATED = ("static", "smooth_calibrated")


def multiply_together(
    linears: Sequence[Any], x: Tensor, rows: Tensor | None, ends: Tensor
) -> Tensor | None:
    """The products of rows that are sorted by expert, in one operator; equal to those one by one.

    Args:
        linears: QuantizedLinears, those of all experts.
        x: float (tokens, K).
        rows: int64 (R,), the token of each row, or None where x has the rows themselves.
        ends: int64 (experts,), where each expert's rows end.

    Returns:
        float (R, N), zeros behind the last expert's rows; None where each expert must run by
        itself: hooks watch it, an input's scale depends on all of its rows, or weights have float
        scales by group.
    """
    bounds = [0, *ends.tolist()]
    counts = [end - start for start, end in pairwise(bounds)]
    used = [expert for expert, count in enumerate(counts) if count]
    if not used:
        return None
    chosen = [linears[expert] for expert in used]
    if not all(_is_free(linear) for linear in chosen):
        return None
    total = len(x) if rows is None else len(rows)
    slices = [(bounds[expert], bounds[expert + 1]) for expert in used]
    quantized = _quantized(chosen, slices, x, rows, total)
    if quantized is None:
        return None
    operands = [
        linear.integer_operands(counts[expert]) for expert, linear in zip(used, chosen, strict=True)
    ]
    weights, steps, *others = zip(*operands, strict=True)
    if any(None in kind and any(one is not None for one in kind) for kind in others):
        return None
    multipliers, biases = ([] if kind[0] is None else list(kind) for kind in others)
    product: Tensor = kernels.expert_gemm(
        quantized.codes,
        quantized.scale,
        ends if len(used) == len(linears) else ends[used],
        list(weights),
        list(steps),
        multipliers,
        biases,
        x.dtype,
    )
    return product


def _is_free(linear: Any) -> bool:
    """Whether a linear is quantized, with one scale a row, and nothing watches it."""
    if not hasattr(linear, "integer_operands") or linear.weight_scale.shape[1] > 1:
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        for module in (linear, linear.site_input)
    )


def _quantized(
    linears: Sequence[Any],
    slices: Sequence[tuple[int, int]],
    x: Tensor,
    rows: Tensor | None,
    total: int,
) -> QuantizedInput | None:
    """Codes (R, K) and scales (R, 1) or (1, 1) of all rows, each quantized for its expert."""
    first = linears[0].site_input
    mode = first.spec.mode
    alike = all(
        linear.site_input is first or (mode in _BY_ROW and linear.site_input.spec == first.spec)
        for linear in linears
    )
    if mode not in (*_BY_ROW, *_CALIBRATED):
        return None
    if alike:
        together = first(x)
        assert isinstance(together, QuantizedInput)
        codes, scale = together.codes, together.scale
        if rows is not None:
            codes = codes[rows]
            scale = scale if scale.shape[0] == 1 else scale[rows]
        return QuantizedInput(codes, scale)
    if any(linear.site_input.spec.mode != mode for linear in linears):
        return None
    ordered = x if rows is None else x[rows]
    codes = torch.zeros(total, x.shape[1], dtype=torch.int8, device=x.device)
    scale = torch.zeros(total, 1, dtype=torch.float32, device=x.device)
    for linear, (start, end) in zip(linears, slices, strict=True):
        part = linear.site_input(ordered[start:end])
        codes[start:end], scale[start:end] = part.codes, part.scale
    return QuantizedInput(codes, scale)
