"""Several processes on one quantization, as `accelerate launch` or `torchrun` start them.

Each holds the same block and its own share of the micro-batches. What they observe is reduced, what
they round is handed round, and the first of them writes. With one process every function here gives
back what it is given.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes of a run. rank: of this one, from 0. device: where it works."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> World:
        """Join the processes that the launcher started, or be alone.

        device: of several processes on GPUs, each takes its own.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, torch.device(device))
        ours = not dist.is_initialized()
        state = PartialState(cpu=device == "cpu")
        if ours:  # else its threads outlive the interpreter, and end the process with an error
            atexit.register(dist.destroy_process_group)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether a piece of work, by its number, is this process's."""
        return number % self.size == self.rank

    def broadcast_from(self, make: Callable[[], Value], number: int = 0) -> Value:
        """What the owner of a piece of work makes, in all processes.

        Called by all of them together; `make` by the owner alone. What it raises, all raise.
        """
        if self.size == 1:
            return make()
        result: list[Value | None] = [None]
        failed: list[Exception | None] = [None]
        if self.owns(number):
            try:
                result[0] = make()
            except Exception as error:  # handed on: the others wait for an answer
                failed[0] = error
        both = [result[0], failed[0]]
        dist.broadcast_object_list(both, src=number % self.size, device=self._carrier)
        if both[1] is not None:
            raise both[1]  # type: ignore[misc]
        return both[0]  # type: ignore[return-value]

    def raise_together(self, make: Callable[[], Value]) -> Value:
        """What every process makes for itself; what one raises, all raise."""
        if self.size == 1:
            return make()
        result: Value | None = None
        failed: Exception | None = None
        try:
            result = make()
        except Exception as error:  # handed on: the others would wait for this process
            failed = error
        for problem in self.gather(failed):
            if problem is not None:
                raise problem
        return result  # type: ignore[return-value]

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum over all processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Value | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        reduced = values.to(self._carrier, copy=True)
        dist.all_reduce(reduced, how)
        return reduced.to(values.device)

    @property
    def _carrier(self) -> torch.device:
        """Where tensors must lie to travel."""
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")
