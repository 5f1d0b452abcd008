"""The hidden states of the calibration tokens, and the statistics observed in each block.

`HiddenStates` stores the input of the current block in micro-batches, in memory or in a file; in a
distributed run each rank stores and observes a share of the micro-batches. A site is observed by
running the block up to the site's first reader and stopping there; experts are observed in one
common forward, as each receives other tokens. Attention runs in float here, even if the recipe
quantizes it in the finished model.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
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
from .observers import AbsMax, AbsQuantile, Observer, SecondMoment


@dataclass(frozen=True)
class _Call:
    """The arguments of a block's forward other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """What all copies of a run's hidden states share.

    sizes: number of tokens of every micro-batch, over all ranks. calls: for each block, the other
    arguments of its forward, by a micro-batch's shape (sequences, tokens).
    """

    sizes: tuple[int, ...]
    calls: list[dict[tuple[int, int], _Call]]
    world: World


class _MicroBatchStore:
    """A store of micro-batches, in memory or in a temporary file deleted with this object."""

    def __init__(self, directory: Path | None) -> None:
        """directory: where to create the file, or None to store the micro-batches in memory."""
        self.directory = directory
        self._batches: dict[int, Tensor] = {}
        self._entries: dict[int, Entry] = {}
        self._file: TensorFile | None = None
        if directory is not None:
            self._file = TensorFile(directory / uuid.uuid4().hex)
            weakref.finalize(self, _remove, self._file)

    def put(self, number: int, batch: Tensor) -> None:
        """Store a micro-batch under its number."""
        if self._file is not None:
            self._entries[number] = self._file.append([batch], tuple(batch.shape))
        elif batch.device.type == "cpu":
            with outside_heap():  # on the heap it would keep the holes that the forward leaves
                self._batches[number] = batch.clone()
        else:
            self._batches[number] = batch

    def get(self, number: int) -> Tensor:
        """The micro-batch stored under a number."""
        if self._file is None:
            return self._batches[number]
        return self._file.read(self._entries[number])

    @property
    def numbers(self) -> list[int]:
        """The numbers of the stored micro-batches, in the order in which they were stored."""
        return list(self._batches if self._file is None else self._entries)


def _remove(file: TensorFile) -> None:
    file.close()
    file.path.unlink(missing_ok=True)


class HiddenStates:
    """The input of one block: float32 micro-batches (sequences, tokens, hidden_size).

    In a distributed run each rank stores the micro-batches that it owns. Methods that take a block
    and its `index` expect the block whose input these hidden states are.
    """

    def __init__(self, store: _MicroBatchStore, run: _Run) -> None:
        """store: the micro-batches that this rank owns."""
        self._store, self._run = store, run

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
        """Embed tokens and record the arguments that the decoder passes to its blocks.

        The modules before the blocks run on the CPU, on every rank, for all tokens.

        Args:
            model: the float model with the modules before the blocks loaded, not rotated; the
                blocks may be on the meta device.
            plan: its plan; its residual rotation is applied to the embedded tokens.
            batches: token ids in micro-batches, int64 (sequences, length).
            world: the ranks of the run.
            directory: where to store the hidden states in a file; None keeps them in memory, on
                the device.
            rotate: replaces the plan's residual rotation, which is computed in float64.

        Returns: the input of the first block.
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
        returns_tuple = plan.wiring.family.returns_tuple
        recorders = [_Recorder(block, block is blocks[-1], returns_tuple) for block in blocks]
        decoder.set_submodule(attribute, nn.ModuleList(recorders))
        store = _MicroBatchStore(directory)
        try:
            for number, batch in enumerate(batches):
                embedded = embedding(batch).float()
                with suppress(_Stopped):
                    decoder(inputs_embeds=embedded, use_cache=False)
                entered = recorders[0].hidden
                if world.owns(number):
                    rotated = entered if rotate is None else rotate(entered)
                    store.put(number, rotated.to(world.device))
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
        return cls(store, _Run(tuple(batch.numel() for batch in batches), calls, world))

    def copy(self) -> HiddenStates:
        """Hidden states that share these values and can be advanced independently."""
        return HiddenStates(self._store, self._run)

    def replace(self, batches: Iterator[Tensor] | None) -> None:
        """Replace the values of all micro-batches.

        Args:
            batches: the new micro-batches in order on rank 0; ignored on other ranks.
        """
        store, world = _MicroBatchStore(self._store.directory), self._run.world
        for number in range(len(self)):
            batch = world.broadcast_from(lambda: next(batches))  # type: ignore[arg-type]
            if world.owns(number):
                store.put(number, batch.to(world.device))
        self._store = store

    def __iter__(self) -> Iterator[Tensor]:
        """Yield every micro-batch in order, on all ranks; collective."""
        return (self.batch(number) for number in range(len(self)))

    def turns(self) -> list[list[tuple[int, float]]]:
        """Group consecutive micro-batches into turns of at most MICRO_BATCH_TOKENS tokens.

        Sequences of equal length fill a micro-batch, which is then a turn by itself; sequences of
        different lengths are in small micro-batches, several of which form a turn.

        Returns: for each turn, (number of a micro-batch, its share of the turn's tokens).
        """
        sizes = self._run.sizes
        turns: list[list[int]] = []
        for number, size in enumerate(sizes):
            turn_tokens = sum(sizes[member] for member in turns[-1]) if turns else 0
            if turns and turn_tokens + size <= MICRO_BATCH_TOKENS:
                turns[-1].append(number)
            else:
                turns.append([number])
        return [
            [(number, sizes[number] / sum(sizes[member] for member in turn)) for number in turn]
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
        """Observe max_t |x_tk| of the inputs of several sites in one forward.

        Args:
            block: the block, its weights still in float.
            name: its full name, for messages.
            index: its number in the model.
            sites: the sites to observe.
            share: 1 for the maximum over tokens; below 1 for that quantile instead.
            advance: whether to replace the hidden states by the block's output as well.

        Returns: site name → float32 (K,); zero for a channel that no token reached.

        Raises:
            NumericsError: the input of a site is NaN or Inf; the message names the site.
        """
        observers: dict[str, AbsMax | AbsQuantile] = {}
        watched: dict[str, Callable[[Tensor], None]] = {}
        for site in sites:
            width = block.get_submodule(site.modules[0]).get_parameter("weight").shape[1]
            observer = observers[site.name] = (
                AbsMax(width) if share == 1 else AbsQuantile(width, share, sum(self._run.sizes))
            )
            watched |= {token_group[0]: observer.update for token_group in site.token_groups}
        self.watch(block, index, watched, advance)
        maxima = {site_name: self._reduced(observers[site_name]) for site_name in observers}
        for site_name, maximum in maxima.items():
            _check_finite(maximum, f"{name}, input of {site_name}")
        return maxima

    def calibrate(
        self, block: nn.Module, index: int, site: Site, site_input: InputQuantizer, normalise: bool
    ) -> None:
        """Set the calibrated scale of an InputQuantizer, if its mode has one.

        Args:
            block: the block that the site belongs to.
            index: its number in the model.
            site: the site whose input is observed.
            site_input: its InputQuantizer, changed in place.
            normalise: whether to divide each token by its largest element first.

        Raises:
            NumericsError: the site's input is NaN or Inf.
        """
        if site_input.spec.mode in ("static", "smooth_calibrated"):
            observer = AbsMax(site_input.spec.width, normalise)

            def update(x: Tensor) -> None:
                observer.update(site_input.rotate(x))

            self.watch(block, index, {token_group[0]: update for token_group in site.token_groups})
            maxima = self._reduced(observer)
            _check_finite(maxima, f"input of {site_input.name}")
            site_input.calibrate(maxima)

    def hessians(
        self, block: nn.Module, index: int, inputs: dict[str, InputQuantizer]
    ) -> dict[str, SecondMoment]:
        """Observe Σ x̂ x̂ᵀ over tokens, where x̂ is the quantized input of a module.

        Args:
            block: the block that the modules belong to.
            index: its number in the model.
            inputs: module name → the InputQuantizer of its input.

        Returns: module name → the observer, reduced over all ranks.

        Raises:
            NumericsError: an input is NaN or Inf; the message names it.
        """
        moments = {module: SecondMoment(inputs[module].spec.width) for module in inputs}

        def update(module: str) -> Callable[[Tensor], None]:
            quantizer, observer = inputs[module], moments[module]
            return lambda x: observer.update(quantizer.dequantized(x))

        self.watch(block, index, {module: update(module) for module in inputs})
        for module, observer in moments.items():
            _check_finite(self._reduced(observer), f"input of {inputs[module].name}")
        return moments

    def _reduced(self, observer: Observer) -> Tensor:
        """The statistic over the tokens of all ranks."""
        observer.reduce(self._run.world)
        return observer.result()

    def advance(self, block: nn.Module, index: int) -> None:
        """Run a block and replace the hidden states by its output, the next block's input."""
        self.watch(block, index, {}, advance=True)

    def __len__(self) -> int:
        """The number of micro-batches over all ranks."""
        return len(self._run.sizes)

    def batch(self, number: int) -> Tensor:
        """A micro-batch, float32 (sequences, tokens, hidden_size), on all ranks; collective."""
        world = self._run.world
        return world.broadcast_from(lambda: self._store.get(number), number).to(world.device)

    def forward(self, block: nn.Module, index: int, batch: Tensor) -> Tensor:
        """The output of a block for one micro-batch, float (sequences, tokens, hidden_size)."""
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
        """Run a block on this rank's micro-batches; pass the inputs of some modules to callbacks.

        With one watched module and without `advance`, each forward stops at that module.

        Args:
            block: the block to run.
            index: its number in the model.
            watched: module name → callback for each of its inputs, float (..., K).
            advance: whether to replace the hidden states by the block's output.
        """
        stops = len(watched) == 1 and not advance

        def hook(into: Callable[[Tensor], None]) -> Callable[..., None]:
            def caught(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                into(args[0])
                if stops:
                    raise _Stopped

            return caught

        outputs = _MicroBatchStore(self._store.directory) if advance else self._store
        with ExitStack() as hooks, busy_heap():
            for module, into in watched.items():
                reader = block.get_submodule(module)
                hooks.enter_context(reader.register_forward_pre_hook(hook(into)))
            for number in self._store.numbers:
                batch = self._store.get(number).to(self._run.world.device)
                with suppress(_Stopped):
                    output = self.forward(block, index, batch)
                    if advance:
                        outputs.put(number, output)
        self._store = outputs


class _Stopped(Exception):
    """Stops a forward once the inputs to observe have been seen."""


class _Recorder(nn.Module):
    """Replaces a block and records the arguments of its calls, by the micro-batch's shape."""

    hidden: Tensor

    def __init__(self, block: nn.Module, last: bool, returns_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._last, self._returns_tuple = last, returns_tuple
        self.calls: dict[tuple[int, int], _Call] = {}

    def __getattr__(self, name: str) -> Any:
        # Attributes of the block that a decoder reads, such as its attention type.
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
