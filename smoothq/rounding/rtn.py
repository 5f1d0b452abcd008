"""Round to nearest: every weight goes to the closest value of its grid."""

import torch
from torch import Tensor

from .grid import IntegerGrid, QuantizedWeight, rows_at_once


def round_to_nearest(weight: Tensor, grid: IntegerGrid) -> QuantizedWeight:
    """Codes and scales of a matrix, float (N, K)."""
    weight = weight.float()
    scales = grid.find_scales(weight)
    steps = scales.step(torch.float32).unsqueeze(-1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    count = rows_at_once(weight)
    chunks = zip(*(whole.split(count) for whole in (weight, steps, codes)), strict=True)
    for rows, step, rounded in chunks:
        grouped = rows.unflatten(-1, (step.shape[1], -1))
        rounded.copy_(grid.codes(grouped, step).flatten(1))
    return QuantizedWeight(codes, scales, weight)
