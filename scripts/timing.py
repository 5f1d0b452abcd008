"""What the benchmarks share: the spread of repeated times, and CUDA graphs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Seconds of one run, over the repetitions."""

    least: float
    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """The spread of some repetitions; all infinite where one is: it was not done."""
        if math.inf in seconds:
            return cls(*[math.inf] * 4)
        values = torch.tensor(seconds, dtype=torch.float64)
        p20, median, p80 = values.quantile(values.new_tensor([0.2, 0.5, 0.8])).tolist()
        return cls(min(seconds), p20, median, p80)


def as_graph(
    step: Callable[[], object], reset: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    """The step as a CUDA graph; before that it autotunes and compiles on a stream of its own.

    reset: what must happen before each warm-up, and is not part of the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            reset()
            step()
        reset()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
