"""Statistics of a site's input over tokens: updated micro-batch by micro-batch, mergeable.

Maxima merge exactly. Sums are accumulated in float64, micro-batch by micro-batch, so that the same
micro-batches in the same order give the same bits. `reduce` merges over the processes of a run.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from ..kernels.reference import SMALLEST_SCALE
from ..runtime.distributed import World


class Observer(Protocol):
    """What a calibration pass fills in. `update` takes float (..., K)."""

    def update(self, x: Tensor) -> None:
        """Take in a micro-batch."""

    def merge(self, other: Self) -> None:
        """Take in what another observer saw."""

    def reduce(self, world: World) -> None:
        """Take in what the observers of all processes saw."""

    def result(self) -> Tensor:
        """The statistic over all tokens so far."""


class AbsMax:
    """max_t |x_tk| of every channel, float32 (K,); with `normalise` of x_t / max_k |x_tk|.

    Zero where no token came.
    """

    def __init__(self, width: int, normalise: bool = False) -> None:
        self._maxima = torch.zeros(width, dtype=torch.float32)
        self._normalise = normalise

    def update(self, x: Tensor) -> None:
        """Take in a micro-batch, float (..., K)."""
        x = x.float().flatten(0, -2)
        if not len(x):
            return
        if self._normalise:
            x = x / x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
        seen = torch.maximum(x.amax(0), -x.amin(0))
        self._maxima = torch.maximum(self._maxima.to(x.device), seen)

    def merge(self, other: AbsMax) -> None:
        """Take in what another observer saw; exact."""
        self._maxima = torch.maximum(self._maxima, other._maxima)

    def reduce(self, world: World) -> None:
        """Take in what the observers of all processes saw; exact."""
        self._maxima = world.maximum(self._maxima)

    def result(self) -> Tensor:
        """float32 (K,)."""
        return self._maxima


class AbsQuantile:
    """A high quantile over tokens of |x_tk|, float32 (K,): exact, from the largest values kept.

    share: 1 is the maximum; 0.999 leaves a thousandth of the tokens above. tokens: at most so many
    will come. Merging is exact.
    """

    def __init__(self, width: int, share: float, tokens: int) -> None:
        self._share, self._seen = share, 0
        self._kept = self._above(tokens) + 1
        self._largest = torch.zeros(0, width, dtype=torch.float32)

    def update(self, x: Tensor) -> None:
        """Take in a micro-batch, float (..., K)."""
        x = x.float().flatten(0, -2).abs()
        self._seen += len(x)
        self._keep(x)

    def merge(self, other: AbsQuantile) -> None:
        """Take in what another observer saw."""
        self._seen += other._seen
        self._keep(other._largest)

    def reduce(self, world: World) -> None:
        """Take in what the observers of all processes saw; exact."""
        held = world.gather((self._seen, self._largest.cpu()))
        self._seen = sum(seen for seen, _ in held)
        self._largest = self._largest[:0]
        for _, largest in held:
            self._keep(largest)

    def result(self) -> Tensor:
        """float32 (K,); zero where no token came."""
        if not self._seen:
            return torch.zeros(self._largest.shape[1], dtype=torch.float32)
        return self._largest.sort(0, descending=True).values[self._above(self._seen)]

    def _above(self, tokens: int) -> int:
        """How many of so many tokens lie above the quantile."""
        return int(round((1 - self._share) * tokens, 6))

    def _keep(self, values: Tensor) -> None:
        both = torch.cat([self._largest.to(values.device), values])
        self._largest = both.topk(min(self._kept, len(both)), dim=0).values


class SecondMoment:
    """Σ_t x_t x_tᵀ, float64 (K, K): the Hessian of a linear layer's squared output error.

    tokens: how many it has seen.
    """

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in a micro-batch, float (..., K)."""
        x = x.float().flatten(0, -2)
        self.tokens += len(x)
        self._sum = self._sum.to(x.device)
        self._sum += x.t() @ x

    def merge(self, other: SecondMoment) -> None:
        """Take in what another observer saw."""
        self._sum += other._sum
        self.tokens += other.tokens

    def reduce(self, world: World) -> None:
        """Take in what the observers of all processes saw, in the order of the reduction."""
        self._sum = world.total(self._sum)
        self.tokens = int(world.total(torch.tensor(self.tokens)))

    def result(self) -> Tensor:
        """float64 (K, K)."""
        return self._sum
