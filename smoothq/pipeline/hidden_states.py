"""The calibration tokens on their way through the blocks, and what is seen of them there.

`HiddenStates` holds what enters the current block, one micro-batch at a time, in memory or in a
file; of several processes each holds and observes its share. A site is observed by running the
block up to the site's first reader and no further; experts, which see different tokens each, are
observed together. Attention is float here, whatever the recipe makes of it in the finished model.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ..architectures import Site
from ..checkpoint.tensor_file import Entry, TensorFile
from ..data.tokens import MICRO_BATCH_TOKENS
from ..errors import NumericsError
from ..modules import InputQuantizer
from ..plan.plan import Plan
from ..runtime.distributed import World
from ..runtime.memory import busy_heap, outside_heap
from .observers import (
    AbsMax,
    AbsQuantile,
    Observer,
    SecondMoment,
)


@dataclass(frozen=True)
class _Call:
    """What a block's forward takes beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """What all hidden states of a run have in common.

    sizes: tokens of each micro-batch, of all processes. calls: for each block, by the sequences and
    tokens of a micro-batch, what else its forward takes.
    """

    sizes: tuple[int, ...]
    calls: list[dict[tuple[int, int], _Call]]
    world: World


class _MicroBatchStore:
    """Micro-batches by their number: in memory, or in a file that goes when they do."""

    def __init__(self, directory: Path | None) -> None:
        """directory: where the file is made; None holds them in memory."""
        self.directory = directory
        self._held: dict[int, Tensor] = {}
        self._entries: dict[int, Entry] = {}
        self._file: TensorFile | None = None
        if directory is not None:
            self._file = TensorFile(directory / uuid.uuid4().hex)
            weakref.finalize(self, _remove, self._file)

    def put(self, number: int, batch: Tensor) -> None:
        if self._file is None:
            self._held[number] = batch
        else:
            self._entries[number] = self._file.append([batch], tuple(batch.shape))

    def get(self, number: int) -> Tensor:
        return self._held[number] if self._file is None else self._file.read(self._entries[number])

    @property
    def numbers(self) -> list[int]:
        return list(self._held if self._file is None else self._entries)


def _remove(file: TensorFile) -> None:
    file.close()
    file.path.unlink(missing_ok=True)


class HiddenStates:
    """What enters block `index`: float32 micro-batches (sequences, tokens, hidden_size)."""

    def __init__(self, shelf: _MicroBatchStore, run: _Run) -> None:
        """shelf: this process's share of the micro-batches."""
        self._shelf, self._run = shelf, run

    @classmethod
    def embed_tokens(
        cls,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Tensor],
        world: World,
        directory: Path | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
    ) -> HiddenStates:
        """Embed micro-batches, int64 (sequences, length), and record what the blocks are handed.

        What stands before the blocks must be loaded, unrotated; the blocks may be on the meta
        device. What stands before them runs on the CPU, in every process for all tokens.
        directory: where micro-batches are held in a file; None holds them in memory, on the device.
        rotate: what rotates them; None does it in float64.
        """
        parts = plan.parts
        if rotate is None and plan.residual_rotation is not None:
            rotate = plan.residual_rotation.apply
        decoder, embedding = (
            model.get_submodule(name) for name in (parts.decoder, parts.embedding)
        )
        attribute = parts.layers.removeprefix(f"{parts.decoder}.")
        blocks = decoder.get_submodule(attribute)
        assert isinstance(blocks, nn.ModuleList)
        returns_tuple = plan.family.returns_tuple
        recorders = [_Recorder(block, block is blocks[-1], returns_tuple) for block in blocks]
        decoder.set_submodule(attribute, nn.ModuleList(recorders))
        shelf = _MicroBatchStore(directory)
        try:
            for number, batch in enumerate(batches):
                embedded = embedding(batch).float()
                _run_until_stopped(decoder, inputs_embeds=embedded, use_cache=False)
                entered = recorders[0].hidden
                if world.owns(number):
                    rotated = entered if rotate is None else rotate(entered)
                    shelf.put(number, rotated.to(world.device))
        finally:
            decoder.set_submodule(attribute, blocks)
        calls = [
            {
                size: _Call(
                    *tree_map_only(Tensor, lambda t: t.to(world.device), (c.args, c.kwargs))
                )
                for size, c in recorder.calls.items()
            }
            for recorder in recorders
        ]
        return cls(shelf, _Run(tuple(batch.numel() for batch in batches), calls, world))

    def copy(self) -> HiddenStates:
        """The same states, to be moved through other blocks."""
        return HiddenStates(self._shelf, self._run)

    def replace(self, batches: Iterator[Tensor] | None) -> None:
        """Take other states in their place, which the leading process reads in order."""
        shelf, world = _MicroBatchStore(self._shelf.directory), self._run.world
        for number in range(len(self)):
            batch = world.broadcast_from(lambda: next(batches))  # type: ignore[arg-type]
            if world.owns(number):
                shelf.put(number, batch.to(world.device))
        self._shelf = shelf

    def __iter__(self) -> Iterator[Tensor]:
        """All micro-batches in order, in all processes."""
        return (self.batch(number) for number in range(len(self)))

    def turns(self) -> list[list[tuple[int, float]]]:
        """Micro-batches that go together, as many as hold a forward's tokens, in order.

        Sequences of one length fill a micro-batch, which then goes alone; those of many lengths
        make small ones. Each comes by its number, with its share of the tokens of its turn.
        """
        turns: list[list[int]] = []
        for number, size in enumerate(self._run.sizes):
            held = sum(self._run.sizes[each] for each in turns[-1]) if turns else 0
            if turns and held + size <= MICRO_BATCH_TOKENS:
                turns[-1].append(number)
            else:
                turns.append([number])
        sizes = self._run.sizes
        return [
            [(each, sizes[each] / sum(sizes[one] for one in turn)) for each in turn]
            for turn in turns
        ]

    def maxima(
        self,
        block: nn.Module,
        name: str,
        index: int,
        sites: list[Site],
        share: float,
        advance: bool,
    ) -> dict[str, Tensor]:
        """max_t |x_tk| at several sites in one forward, by site name; 0 where no token came.

        For a block whose weights are still float. share: below 1 the quantile instead of the
        maximum. advance: move past the block as well. Raises NumericsError naming a site whose
        input is not finite.
        """
        seen: dict[str, AbsMax | AbsQuantile] = {}
        watched: dict[str, Callable[[Tensor], None]] = {}
        for site in sites:
            width = block.get_submodule(site.modules[0]).get_parameter("weight").shape[1]
            seen[site.name] = (
                AbsMax(width) if share == 1 else AbsQuantile(width, share, sum(self._run.sizes))
            )
            watched |= {token_group[0]: seen[site.name].update for token_group in site.token_groups}
        self.watch(block, index, watched, advance)
        maxima = {site: self._reduced(observer) for site, observer in seen.items()}
        for site_name, maximum in maxima.items():
            _check_finite(maximum, f"{name}, input of {site_name}")
        return maxima

    def calibrate(
        self, block: nn.Module, index: int, site: Site, site_input: InputQuantizer, normalise: bool
    ) -> None:
        """Set an InputQuantizer's calibrated scale, where its mode has one."""
        if site_input.spec.mode in ("static", "calibrated"):
            seen = AbsMax(site_input.spec.width, normalise)

            def update(x: Tensor) -> None:
                seen.update(site_input.rotate(x))

            self.watch(block, index, {token_group[0]: update for token_group in site.token_groups})
            maxima = self._reduced(seen)
            _check_finite(maxima, f"input of {site_input.name}")
            site_input.calibrate(maxima)

    def hessians(
        self, block: nn.Module, index: int, inputs: dict[str, InputQuantizer]
    ) -> dict[str, SecondMoment]:
        """Σ x̂ x̂ᵀ of the inputs of modules as their weights will see them, by module.

        inputs: module name → what quantizes its input. Raises NumericsError naming the input that
        is not finite.
        """
        seen = {module: SecondMoment(inputs[module].spec.width) for module in inputs}

        def update(module: str) -> Callable[[Tensor], None]:
            quantizer, observer = inputs[module], seen[module]
            return lambda x: observer.update(quantizer.dequantized(x))

        self.watch(block, index, {module: update(module) for module in inputs})
        for module, observer in seen.items():
            _check_finite(self._reduced(observer), f"input of {inputs[module].name}")
        return seen

    def _reduced(self, observer: Observer) -> Tensor:
        """What the observers of all processes saw."""
        observer.reduce(self._run.world)
        return observer.result()

    def advance(self, block: nn.Module, index: int) -> None:
        """Move past a block: its output becomes what enters the next."""
        self.watch(block, index, {}, advance=True)

    def __len__(self) -> int:
        """Micro-batches, of all processes."""
        return len(self._run.sizes)

    def batch(self, number: int) -> Tensor:
        """A micro-batch, float32 (sequences, tokens, hidden_size), in all processes."""
        world = self._run.world
        return world.broadcast_from(lambda: self._shelf.get(number), number).to(world.device)

    def forward(self, block: nn.Module, index: int, batch: Tensor) -> Tensor:
        """A block's output for one micro-batch."""
        call = self._run.calls[index][batch.shape[0], batch.shape[1]]
        output = block(batch, *call.args, **call.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def watch(
        self,
        block: nn.Module,
        index: int,
        watched: dict[str, Callable[[Tensor], None]],
        advance: bool = False,
    ) -> None:
        """Call `watched[module]` with every input of a module of a block, float (..., K).

        advance: move past the block as well. One module alone, without it, ends each forward where
        it is reached.
        """
        stops = len(watched) == 1 and not advance

        def hook(into: Callable[[Tensor], None]) -> Callable[..., None]:
            def caught(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                into(args[0])
                if stops:
                    raise _Stopped

            return caught

        handles = [
            block.get_submodule(module).register_forward_pre_hook(hook(into))
            for module, into in watched.items()
        ]
        try:
            moved = _MicroBatchStore(self._shelf.directory) if advance else self._shelf
            with busy_heap():
                for number in self._shelf.numbers:
                    batch = self._shelf.get(number).to(self._run.world.device)
                    try:
                        output = self.forward(block, index, batch)
                    except _Stopped:
                        continue
                    if advance:
                        moved.put(number, _set_apart(output))
            self._shelf = moved
        finally:
            for handle in handles:
                handle.remove()


def _set_apart(output: Tensor) -> Tensor:
    """A copy that stands outside the heap, which would keep the holes between what stays in it."""
    with outside_heap():
        return output.clone()


class _Stopped(Exception):
    """Ends a forward whose rest is not needed."""


def _run_until_stopped(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    try:
        module(*args, **kwargs)
    except _Stopped:
        return


class _Recorder(nn.Module):
    """Stands in for a block and keeps what it is called with, by the micro-batch's shape."""

    hidden: Tensor

    def __init__(self, block: nn.Module, last: bool, returns_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._last, self._returns_tuple = last, returns_tuple
        self.calls: dict[tuple[int, int], _Call] = {}

    def __getattr__(self, name: str) -> Any:
        # What a decoder asks of a block beside calling it, such as its kind of attention.
        return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden = hidden
        self.calls[hidden.shape[0], hidden.shape[1]] = _Call(args, kwargs)
        if self._last:
            raise _Stopped
        return (hidden, None) if self._returns_tuple else hidden


def _check_finite(statistic: Tensor, where: str) -> None:
    if not torch.isfinite(statistic).all():
        raise NumericsError(f"{where} holds NaN or Inf on the calibration text")
