"""Round to nearest: every weight goes to the closest value of its grid."""

import torch
from torch import Tensor

from .grid import IntegerGrid, QuantizedWeight


def round_to_nearest(weight: Tensor, grid: IntegerGrid) -> QuantizedWeight:
    """Codes and scales of a matrix, float (N, K)."""
    scales = grid.find_scales(weight)
    weight = weight.float()
    step = scales.step_by_column(weight.shape[1], torch.float32)
    return QuantizedWeight(grid.codes(weight, step).to(torch.int8), scales, weight)
