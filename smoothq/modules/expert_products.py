"""All experts of a layer multiplied at once, in place of one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import QuantizedInput
from .input_quantizer import Mode

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
        itself: hooks watch it, an input's scale depends on all of its rows, weights or inputs are
        floating-point codes, weights under quantized inputs have float scales by group, weights
        under float inputs have zero points, or experts differ in what the operator needs alike.
    """
    bounds = [0, *ends.tolist()]
    used = [
        (linear, start, end)
        for linear, (start, end) in zip(linears, pairwise(bounds), strict=True)
        if end > start
    ]
    if not used or any(_runs_alone(linear) for linear, _, _ in used):
        return None
    first, *_ = used[0]
    mode = first.site_input.spec.mode
    if product_of_experts(mode, first.spec) is None:
        return None
    stops = torch.tensor([end for _, _, end in used], device=x.device)
    if mode == "float":
        return _of_floats(used, x, rows, stops)
    return _of_codes(used, x, rows, stops)


_Used = Sequence[tuple[Any, int, int]]  # an expert's linear, and where its rows begin and end


def _of_codes(used: _Used, x: Tensor, rows: Tensor | None, ends: Tensor) -> Tensor | None:
    """As `multiply_together` of the experts that have rows, whose inputs are quantized."""
    operands = [linear.integer_operands(end - start) for linear, start, end in used]
    weights, steps, *others = zip(*operands, strict=True)
    multipliers, biases = (_all_or_none(kind) for kind in others)
    if multipliers is None or biases is None or any(step is None for step in steps):
        return None
    if not x.is_cpu and len({weight.dtype for weight in weights}) > 1:
        return None
    quantized = _quantized(used, x, rows)
    if quantized is None:
        return None
    product: Tensor = kernels.expert_gemm(
        quantized.codes,
        quantized.scale,
        ends,
        list(weights),
        list(steps),
        multipliers,
        biases,
        x.dtype,
    )
    return product


def _of_floats(used: _Used, x: Tensor, rows: Tensor | None, ends: Tensor) -> Tensor | None:
    """As `multiply_together` of the experts that have rows, whose inputs stay floats."""
    first = used[0][0]
    if any(
        linear.spec != first.spec or linear.site_input.spec != first.site_input.spec
        for linear, _, _ in used
    ):
        return None
    operands = [linear.float_operands() for linear, _, _ in used]
    weights, scales, *others, bits = zip(*operands, strict=True)
    multipliers, biases = (_all_or_none(kind) for kind in others)
    if multipliers is None or biases is None or len(set(bits)) > 1:
        return None
    inputs = first.site_input(x)
    product: Tensor = kernels.expert_weight_only_gemm(
        inputs if rows is None else inputs[rows],
        ends,
        list(weights),
        list(scales),
        multipliers,
        biases,
        bits[0],
    )
    return product


def product_of_experts(mode: Mode, spec: Any) -> str | None:
    """The operator that multiplies all experts at once; None where each must run by itself.

    Args:
        mode: of their inputs.
        spec: the WeightSpec of their weights.
    """
    if mode == "float":
        whole = spec.grid.symmetric and not spec.floating
        return "expert_weight_only_gemm" if whole else None
    by_row = mode in (*_BY_ROW, *_CALIBRATED)
    return "expert_gemm" if by_row and not spec.float_groups else None


def _runs_alone(linear: Any) -> bool:
    """Whether a linear must run by itself: float, transient, or with hooks on its forward."""
    if not hasattr(type(linear), "integer_operands") or linear.transient:
        return True
    return any(
        module["_forward_hooks"] or module["_forward_pre_hooks"] or "forward" in module
        for module in (linear.__dict__, linear.site_input.__dict__)
    )


def _all_or_none(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """All tensors; none of them, if there are none; None where some are missing."""
    given = [tensor for tensor in tensors if tensor is not None]
    return given if len(given) in (0, len(tensors)) else None


def _quantized(used: _Used, x: Tensor, rows: Tensor | None) -> QuantizedInput | None:
    """Codes (R, K) and scales (R, 1) or (1, 1) of all rows, each quantized for its expert.

    Args:
        used: each expert's linear, and where its rows begin and end.
        x: float (tokens, K).
        rows: the token of each row, or None where x has the rows themselves.
    """
    first = used[0][0].site_input
    mode = first.spec.mode
    inputs = [linear.site_input for linear, _, _ in used]
    if mode not in (*_BY_ROW, *_CALIBRATED):
        return None
    if all(one is first or (mode in _BY_ROW and one.spec == first.spec) for one in inputs):
        together = first(x)
        if rows is None:
            return QuantizedInput(together.codes, together.scale)
        scale = together.scale if together.scale.shape[0] == 1 < len(x) else together.scale[rows]
        return QuantizedInput(together.codes[rows], scale)
    if any(one.spec.mode != mode for one in inputs):
        return None
    ordered = x if rows is None else x[rows]
    codes = torch.zeros(ordered.shape, dtype=torch.int8, device=x.device)
    scale = torch.zeros(len(ordered), 1, dtype=torch.float32, device=x.device)
    for one, (_, start, end) in zip(inputs, used, strict=True):
        part = one(ordered[start:end])
        codes[start:end], scale[start:end] = part.codes, part.scale
    return QuantizedInput(codes, scale)
