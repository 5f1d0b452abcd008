"""Round-to-nearest: every weight gets the closest code of its grid."""

import torch
from torch import Tensor

from .grid import Grid, QuantizedWeight, rows_at_once


def round_to_nearest(weight: Tensor, grid: Grid, largest: float | None = None) -> QuantizedWeight:
    """Codes and scales of a matrix, each weight rounded to the nearest code.

    Args:
        weight: float (N, K).
        grid: of the codes.
        largest: as of `Grid.find_scales`.
    """
    weight = weight.float()
    scales = grid.find_scales(weight, largest)
    steps = scales.step(torch.float32).unsqueeze(-1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    count = rows_at_once(weight)
    for rows in (slice(i, i + count) for i in range(0, len(weight), count)):
        grouped = weight[rows].unflatten(-1, (steps.shape[1], -1))
        zero = None if scales.zero is None else scales.zero[rows].unsqueeze(-1)
        codes[rows] = grid.codes(grouped, steps[rows], zero).flatten(1)
    return QuantizedWeight(codes, scales, weight, grid.element)
