"""Inputs at the ends of what a quantizer meets: float32 (3, 24)."""

import torch
from torch import Tensor


def _noise() -> Tensor:
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(7))


def _with(value: float) -> Tensor:
    x = _noise()
    x[1, 5] = value
    return x


EXTREMES = {
    "zeros": torch.zeros(3, 24),
    "a dead token among others": _noise() * torch.tensor([[1.0], [0.0], [1.0]]),
    "an outlier": torch.ones(3, 24).index_fill_(1, torch.tensor([5]), -1e4),
    "near the largest": torch.arange(-36, 36).reshape(3, 24) * 9e36,
    "denormals": torch.arange(-36, 36).reshape(3, 24) * 2.0**-149,
    "ties": torch.cat([torch.arange(-7, 8) / 2, torch.full((9,), 7.0)]).repeat(3, 1),
    "negative zeros": torch.full((3, 24), -0.0),
    "a NaN": _with(torch.nan),
    "an infinity": _with(torch.inf),
    "a negative infinity": _with(-torch.inf),
    "both infinities and a NaN": torch.tensor([torch.inf, -torch.inf, torch.nan] * 8).repeat(3, 1),
}
