"""Statistics of a site's input over tokens, updated with each micro-batch and mergeable.

Maxima merge exactly. Sums are accumulated in float64, micro-batch by micro-batch, so that the same
micro-batches in the same order give the same bits. `reduce` merges over the ranks of a run.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from ..kernels.reference import SMALLEST_SCALE
from ..runtime.distributed import World


class Observer(Protocol):
    """A statistic over tokens that a calibration pass collects."""

    def update(self, x: Tensor) -> None:
        """Add the tokens of a micro-batch, float (..., K)."""

    def merge(self, other: Self) -> None:
        """Add the tokens that another observer has seen."""

    def reduce(self, world: World) -> None:
        """Add the tokens that the observers of all other ranks have seen; collective."""

    def result(self) -> Tensor:
        """The statistic over all tokens so far."""


class AbsMax:
    """max_t |x_tk| of every channel k, float32 (K,); zero before the first token."""

    def __init__(self, width: int, normalise: bool = False) -> None:
        """width: K. normalise: divide each token by its largest |x_tk| first."""
        self._maxima = torch.zeros(width, dtype=torch.float32)
        self._normalise = normalise

    def update(self, x: Tensor) -> None:
        """Add the tokens of a micro-batch, float (..., K)."""
        x = x.float().flatten(0, -2)
        if not len(x):
            return
        if self._normalise:
            x = x / x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
        maxima = torch.maximum(x.amax(0), -x.amin(0))
        self._maxima = torch.maximum(self._maxima.to(x.device), maxima)

    def merge(self, other: AbsMax) -> None:
        """Add the tokens that another observer has seen; exact."""
        self._maxima = torch.maximum(self._maxima, other._maxima)

    def reduce(self, world: World) -> None:
        """Add the tokens that all other ranks have seen; exact."""
        self._maxima = world.maximum(self._maxima)

    def result(self) -> Tensor:
        """The maxima, float32 (K,)."""
        return self._maxima


class AbsQuantile:
    """A high quantile over tokens of |x_tk| for every channel k, float32 (K,).

    Exact, also after merging: all values above the quantile are stored.
    """

    def __init__(self, width: int, share: float, tokens: int) -> None:
        """Start with no tokens.

        Args:
            width: K.
            share: the quantile; 0.999 leaves a thousandth of the tokens above it, 1 is the maximum.
            tokens: an upper bound for the number of tokens over all ranks.
        """
        self._share, self._seen = share, 0
        self._kept = self._above(tokens) + 1
        self._largest = torch.zeros(0, width, dtype=torch.float32)

    def update(self, x: Tensor) -> None:
        """Add the tokens of a micro-batch, float (..., K)."""
        x = x.float().flatten(0, -2).abs()
        self._seen += len(x)
        self._keep(x)

    def merge(self, other: AbsQuantile) -> None:
        """Add the tokens that another observer has seen; exact."""
        self._seen += other._seen
        self._keep(other._largest)

    def reduce(self, world: World) -> None:
        """Add the tokens that all other ranks have seen; exact."""
        by_rank = world.gather((self._seen, self._largest.cpu()))
        self._seen = sum(seen for seen, _ in by_rank)
        self._largest = self._largest[:0]
        for _, largest in by_rank:
            self._keep(largest)

    def result(self) -> Tensor:
        """The quantiles, float32 (K,); zero before the first token."""
        if not self._seen:
            return torch.zeros(self._largest.shape[1], dtype=torch.float32)
        return self._largest.sort(0, descending=True).values[self._above(self._seen)]

    def _above(self, tokens: int) -> int:
        """How many of `tokens` values per channel lie above the quantile."""
        return int(round((1 - self._share) * tokens, 6))

    def _keep(self, values: Tensor) -> None:
        candidates = torch.cat([self._largest.to(values.device), values])
        self._largest = candidates.topk(min(self._kept, len(candidates)), dim=0).values


class SecondMoment:
    """Σ_t x_t x_tᵀ, float64 (K, K): the Hessian of a linear layer's squared output error.

    Attributes:
        tokens: the number of tokens seen.
    """

    def __init__(self, width: int) -> None:
        """width: K."""
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add the tokens of a micro-batch, float (..., K)."""
        x = x.float().flatten(0, -2)
        self.tokens += len(x)
        self._sum = self._sum.to(x.device)
        self._sum += x.t() @ x

    def merge(self, other: SecondMoment) -> None:
        """Add the tokens that another observer has seen."""
        self._sum += other._sum
        self.tokens += other.tokens

    def reduce(self, world: World) -> None:
        """Add the tokens of all other ranks; the rounding depends on the order of the reduction."""
        self._sum = world.total(self._sum)
        self.tokens = int(world.total(torch.tensor(self.tokens)))

    def result(self) -> Tensor:
        """The sum, float64 (K, K)."""
        return self._sum
