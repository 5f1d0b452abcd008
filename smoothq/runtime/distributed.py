"""Several processes for one quantization, as `accelerate launch` or `torchrun` start them.

Every rank loads the same block and keeps its share of the micro-batches. Statistics are reduced
over all ranks, rounded weights are broadcast from the rank that rounded them, and the main process
(rank 0) writes the output. With one process nothing is communicated: `maximum` and `total` return
their argument, `broadcast_from` and `raise_together` just call `make`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: index of this process, from 0; rank 0 is the main process.
        size: number of processes.
        device: the device that this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> World:
        """Join the process group that the launcher set up; without one, a World of size 1.

        Args:
            device: `cpu` or `cuda`; of several processes on GPUs, each gets a GPU to itself.

        Raises:
            RuntimeError: accelerate's state was made before the launcher's variables were set and
                knows of fewer processes, which would then all write the output.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1, torch.device(device))
        creates_group = not dist.is_initialized()
        state = PartialState(cpu=device == "cpu")
        if state.num_processes != size:
            raise RuntimeError(
                f"WORLD_SIZE is {size}, but accelerate's state was made for "
                f"{state.num_processes} process(es) before it was set; start the processes with "
                "`accelerate launch` or `torchrun`"
            )
        if creates_group:  # its threads would outlive the interpreter and end it with an error
            atexit.register(dist.destroy_process_group)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0), which writes the output and prints."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether this rank owns a piece of work: number `n` belongs to rank `n % size`."""
        return number % self.size == self.rank

    def broadcast_from(self, make: Callable[[], Value], number: int = 0) -> Value:
        """Run `make` on one rank and return its result on every rank.

        A collective operation: all ranks must call it, in the same order. An exception from `make`
        is broadcast in place of a result and raised on every rank.

        Args:
            make: called on the owning rank only; its result or exception must be picklable.
            number: of the piece of work; rank `number % size` owns it, by default the main process.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]  # result, exception
        if self.owns(number):
            try:
                outcome[0] = make()
            except Exception as error:  # broadcast: the other ranks wait for a result
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=number % self.size, device=self._carrier)
        result: Value = outcome[0]
        if outcome[1] is not None:
            raise outcome[1]
        return result

    def raise_together(self, make: Callable[[], Value]) -> Value:
        """Run `make` on every rank and return this rank's result, or raise on all ranks.

        A collective operation: all ranks must call it, in the same order. Where `make` fails on any
        rank, all ranks raise the exception of the lowest rank that failed, so that none waits in
        its next collective for a process that has ended.

        Args:
            make: called on every rank; an exception must be picklable.
        """
        if self.size == 1:
            return make()
        result: Value | None = None
        failure: Exception | None = None
        try:
            result = make()
        except Exception as error:  # gathered: all ranks raise it
            failure = error
        for failure_of_rank in self.gather(failure):
            if failure_of_rank is not None:
                raise failure_of_rank
        return result  # type: ignore[return-value]

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum of a tensor over all ranks, on its device. A collective."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum of a tensor over all ranks, on its device. A collective."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in rank order, on every rank. A collective; it pickles them."""
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
        """The device on which the backend takes tensors: NCCL this GPU, others the CPU."""
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")
