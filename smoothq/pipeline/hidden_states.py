"""The hidden states of the calibration tokens, and the statistics observed in each block.

`HiddenStates` stores the input of the current block in micro-batches, in memory or in a file; in a
distributed run each rank stores and observes a share of the micro-batches. A site is observed by
running the block up to the site's first reader and stopping there; experts are observed in one
common forward, as each receives other tokens. Attention runs in float here, even if the recipe
quantizes it in the finished model.
"""

from __future__ import annotations

import copy
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..architectures import Site
from ..architectures.added_features import rotate_added as with_rotated_features
from ..checkpoint.tensor_file import Entry, TensorFile
from ..data.tokens import MICRO_BATCH_TOKENS, Batch
from ..errors import (
    CalibrationError,
    NumericsError,
    SmoothqError,
    UnsupportedModelError,
    first_line,
)
from ..modules import InputQuantizer
from ..plan.plan import Plan
from ..runtime.distributed import World
from ..runtime.memory import busy_heap, outside_heap
from .observers import AbsMax, AbsQuantile, Observer, SecondMoment
from .trace import (
    ENTRY,
    Arguments,
    Constant,
    Forms,
    Reply,
    Slot,
    Trace,
    Tracer,
    changed,
    in_place_of_blocks,
    read,
    snapshot,
    tensors_in,
    tensors_of,
    written,
)
from .weights_on_demand import HeadReached


@dataclass(frozen=True)
class _Run:
    """What all copies of a run's hidden states share.

    Attributes:
        batches: every micro-batch, over all ranks.
        traces: what the decoder passes to its blocks, by `_kind`.
        constants: of every micro-batch of this rank, those that depend on its tokens, by
            (micro-batch, number of the constant).
        world: the ranks of the run.
    """

    batches: tuple[Batch, ...]
    traces: dict[tuple[int, ...], Trace]
    constants: _TensorStore
    world: World

    def trace(self, number: int) -> Trace:
        """The trace of a micro-batch."""
        return self.traces[_kind(number, self.batches[number])]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens of every micro-batch."""
        return tuple(batch.tokens.numel() for batch in self.batches)


def _kind(number: int, batch: Batch) -> tuple[int, ...]:
    """What micro-batches with one trace share: of text the shape. No two with images share one."""
    return (number,) if batch.features else tuple(batch.tokens.shape)


class _TensorStore:
    """A store of tensors by key, in memory or in a temporary file deleted with this object."""

    def __init__(self, directory: Path | None) -> None:
        """directory: where to create the file, or None to store the tensors in memory."""
        self.directory = directory
        self._tensors: dict[Hashable, Tensor] = {}
        self._entries: dict[Hashable, Entry] = {}
        self._file: TensorFile | None = None
        if directory is not None:
            self._file = TensorFile(directory / uuid.uuid4().hex)
            weakref.finalize(self, _remove, self._file)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Store a tensor under its key."""
        if self._file is not None:
            self._entries[key] = self._file.append([tensor], tuple(tensor.shape))
        elif tensor.device.type == "cpu":
            with outside_heap():  # on the heap it would keep the holes that the forward leaves
                self._tensors[key] = tensor.detach().clone()
        else:
            self._tensors[key] = tensor.detach()

    def get(self, key: Hashable) -> Tensor:
        """The tensor stored under a key."""
        if self._file is None:
            return self._tensors[key]
        return self._file.read(self._entries[key])

    def take_over(self, key: Hashable, other: _TensorStore) -> None:
        """Store what another store has under a key; in memory it is the same tensor."""
        if self._file is None:
            self._tensors[key] = other.get(key)
        else:
            self.put(key, other.get(key))


def _remove(file: TensorFile) -> None:
    file.close()
    file.path.unlink(missing_ok=True)


class HiddenStates:
    """The input of one block, in micro-batches, float32.

    What is stored of a micro-batch are the hidden states, mostly (sequences, tokens, hidden_size),
    and what else later blocks read of earlier ones (`Trace.carried`, `Trace.changing`). In a
    distributed run each rank stores the micro-batches that it owns. Methods that take a block
    and its `index` expect the block whose input these hidden states are. A block that the decoder
    does not call leaves them as they are. Of a block that it calls several times, statistics are
    those of the first call; for the others a copy of the block is kept.
    """

    def __init__(
        self, store: _TensorStore, run: _Run, call: int, texts: dict[tuple[int, int], str]
    ) -> None:
        """Hidden states that enter a call of a block.

        Args:
            store: of the micro-batches that this rank owns: (micro-batch, slot) → tensor, and
                (micro-batch, shared object, tensor in it) → tensor.
            run: what all copies share.
            call: the number of the call.
            texts: (micro-batch, shared object) → how its tensors lie in it, where a block has
                changed it.
        """
        self._store, self._run, self._call, self._texts = store, run, call, texts
        self._repeated: dict[int, nn.Module] = {}  # copies of blocks that are called again
        self._numbers = [number for number in range(len(run.batches)) if run.world.owns(number)]

    @classmethod
    def embed_tokens(
        cls,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Batch],
        world: World,
        weights: TorchFunctionMode,
        directory: Path | None = None,
        *,
        rotate: Callable[[Tensor], Tensor] | None = None,
        rotate_added: Callable[[Tensor], Tensor] | None = None,
    ) -> HiddenStates:
        """Run the decoder on tokens, with recorders in place of its blocks.

        With images or sound the whole model runs, its towers too. What is outside the blocks runs
        on the CPU, on every rank, for all tokens.

        Args:
            model: the float model on the meta device, not rotated.
            plan: its plan; its residual rotation is applied to the embedded tokens.
            batches: the micro-batches.
            world: the ranks of the run.
            weights: a context in which the model computes with its weights.
            directory: where to store the hidden states in a file; None keeps them in memory, on
                the device.
            rotate: replaces the plan's residual rotation, which is computed in float64.
            rotate_added: rotates the features of images that the decoder adds between its blocks;
                None does as `rotate`.

        Returns: the input of the first block.

        Raises:
            UnsupportedModelError: the decoder calls no block, or not in their order at first.
            CalibrationError: the model does not take a batch, or takes batches with images through
                other blocks than those without.
        """
        if rotate is None and plan.residual_rotation is not None:
            rotate = plan.residual_rotation.apply
        rotate_added = rotate_added or rotate
        decoder: nn.Module = model.get_submodule(plan.parts.decoder)
        store, constants = _TensorStore(directory), _TensorStore(directory)
        forms, traces = Forms(), dict[tuple[int, ...], Trace]()
        for number, batch in enumerate(batches):
            tracer = Tracer([batch.tokens, *batch.features.values()], forms, bool(batch.features))
            with (
                _named(batch),
                suppress(HeadReached),
                _adding(decoder, rotate_added),
                in_place_of_blocks(model, plan.parts, tracer.record),
                tracer,
                weights,
            ):
                whole: nn.Module = model if batch.features else decoder
                whole(input_ids=batch.tokens, use_cache=False, **batch.features)
            trace, entered = tracer.trace, tracer.entered.float()
            trace.prune()
            _check_order(trace, plan)
            _check_same_blocks(trace, traces.values())
            if world.owns(number):
                rotated = entered if rotate is None else rotate(entered)
                store.put((number, ENTRY), rotated.to(world.device))
                for key in trace.varying:
                    constants.put((number, key), trace.constants[key].to(world.device))
            trace.forget_varying(world.device)
            traces.setdefault(_kind(number, batch), trace)
        return cls(store, _Run(tuple(batches), traces, constants, world), 0, {})

    def copy(self) -> HiddenStates:
        """Hidden states that share these values and can be advanced independently."""
        copied = HiddenStates(self._store, self._run, self._call, dict(self._texts))
        copied._repeated = dict(self._repeated)
        return copied

    def only(self, number: int) -> HiddenStates:
        """A copy of which one micro-batch alone is advanced."""
        single = self.copy()
        single._numbers = [owned for owned in self._numbers if owned == number]
        return single

    def replace(self, tensors: Iterator[Tensor] | None, index: int = 0) -> None:
        """Replace everything that is stored, by what iterating over hidden states gave.

        Args:
            tensors: in order on rank 0; ignored on other ranks.
            index: the number of the block whose input they are.
        """
        self._fill(tensors, self._run.trace(0).call_from(index) if self._run.batches else 0)

    def gathered(self) -> HiddenStates:
        """A copy that every rank has all of, to run what follows the blocks on one; collective."""
        self._repeat()
        run = replace(self._run, world=World(0, 1, self.device))
        alone = HiddenStates(_TensorStore(None), run, self._call, {})
        alone._fill(iter([*self]), self._call)
        return alone

    def _fill(self, tensors: Iterator[Tensor] | None, call: int) -> None:
        store, world, texts = _TensorStore(self._store.directory), self._run.world, {}

        def following() -> Tensor:
            return world.broadcast_from(lambda: next(tensors))  # type: ignore[arg-type]

        for number in range(len(self)):
            trace, batch = self._run.trace(number), dict[Hashable, Tensor]()
            for slot in reversed(trace.carried(call)):
                batch[number, slot] = following()
            for shared in trace.changing(call):
                text = bytes(following().tolist()).decode()
                if text:
                    texts[number, shared] = text
                for place in range(tensors_in(text) if text else 0):
                    batch[number, shared, place] = following()
            for key, tensor in batch.items() if world.owns(number) else ():
                store.put(key, tensor.to(world.device))
        self._store, self._call, self._texts = store, call, texts

    def __iter__(self) -> Iterator[Tensor]:
        """Yield everything that is stored, micro-batch by micro-batch, on all ranks; collective.

        Of a micro-batch first the hidden states, then what else later blocks read.
        """
        self._repeat()
        for number in range(len(self)):
            trace = self._run.trace(number)
            for slot in reversed(trace.carried(self._call)):
                yield self._stored(number, slot)
            for shared in trace.changing(self._call):
                text = self._everywhere(number, partial(self._texts.get, (number, shared), ""))
                yield torch.tensor(list(text.encode()), dtype=torch.uint8)
                for place in range(tensors_in(text) if text else 0):
                    yield self._stored(number, shared, place)

    def _stored(self, number: int, *key: Hashable) -> Tensor:
        """A stored tensor of a micro-batch, on all ranks; collective."""
        tensor: Tensor = self._everywhere(number, lambda: self._store.get((number, *key)))
        return tensor.to(self._run.world.device)

    def _everywhere(self, number: int, make: Callable[[], Any]) -> Any:
        return self._run.world.broadcast_from(make, number)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Every micro-batch, over all ranks."""
        return self._run.batches

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self._run.world.device

    def reach(self, index: int) -> bool:
        """Whether the decoder passes these hidden states through a block, by its number."""
        return bool(self._run.batches) and self._run.trace(0).call_of(index) is not None

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
        if site_input.spec.calibrated:
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
        return len(self._run.batches)

    def batch(self, number: int) -> Tensor:
        """The hidden states of a micro-batch, float32, on all ranks; collective."""
        return self._stored(number, Slot(self._call - 1))

    def forward(self, block: nn.Module, index: int, number: int) -> Tensor:
        """What a block makes of the hidden states of a micro-batch, on all ranks; collective."""
        if not self.reach(index):
            return self.batch(number)
        self._repeat()
        world = self._run.world
        inputs = world.broadcast_from(lambda: self._inputs(number), number)
        hidden: Tensor = tensors_of(self._called(block, number, inputs)[0])[0]
        return hidden

    def _inputs(self, number: int) -> _Inputs:
        """What a call of a block needs of a micro-batch that this rank owns."""
        trace = self._run.trace(number)
        return _Inputs(
            {slot: self._store.get((number, slot)) for slot in trace.carried(self._call)},
            {key: self._run.constants.get((number, key)) for key in trace.varying_in(self._call)},
            {
                shared: read(
                    self._texts[number, shared],
                    [
                        self._store.get((number, shared, place))
                        for place in range(tensors_in(self._texts[number, shared]))
                    ],
                )
                for shared in trace.changing(self._call)
                if (number, shared) in self._texts
            },
        )

    def _called(self, block: nn.Module, number: int, inputs: _Inputs) -> tuple[Any, dict[int, Any]]:
        """Run a block on a micro-batch: its result, and the objects that it has changed."""
        trace, device = self._run.trace(number), self._run.world.device

        def tensor(reference: Constant | Slot) -> Tensor:
            if isinstance(reference, Slot):
                return inputs.slots[reference].to(device)
            if reference.number in trace.varying:
                return inputs.constants[reference.number].to(device)
            return trace.constants[reference.number]

        arguments = Arguments(trace, tensor, inputs.shared.get, device)
        args, kwargs = arguments.of(trace.calls[self._call])
        before = {
            shared: snapshot(value)
            for shared, value in arguments.shared.items()
            if trace.shared[shared].carries
        }
        result = block(*args, **kwargs)
        return result, {
            shared: arguments.shared[shared]
            for shared, parts in before.items()
            if changed(parts, snapshot(arguments.shared[shared]))
        }

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
        if not self.reach(index):
            return
        self._repeat()
        stops = len(watched) == 1 and not advance

        def hook(into: Callable[[Tensor], None]) -> Callable[..., None]:
            def caught(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                into(args[0])
                if stops:
                    raise _Stopped

            return caught

        with ExitStack() as hooks:
            for module, into in watched.items():
                reader = block.get_submodule(module)
                hooks.enter_context(reader.register_forward_pre_hook(hook(into)))
            self._go(block, advance)
        if advance and self._run.trace(0).calls_again(index, self._call - 1):
            self._repeated[index] = copy.deepcopy(block)

    def _go(self, block: nn.Module, advance: bool) -> None:
        """Run a block on this rank's micro-batches, and perhaps go on to the next call."""
        outputs = _TensorStore(self._store.directory) if advance else self._store
        with busy_heap():
            for number in self._numbers:
                with suppress(_Stopped):
                    result, shared = self._called(block, number, self._inputs(number))
                    if advance:
                        self._keep(number, result, shared, outputs)
        if advance:
            self._store, self._call = outputs, self._call + 1

    @torch.no_grad()
    def _repeat(self) -> None:
        """Go through the blocks that are called again before the next one is called first."""
        calls = self._run.trace(0).calls if self._run.batches else []
        while self._call < len(calls) and calls[self._call].block in self._repeated:
            index = calls[self._call].block
            self._go(self._repeated[index], advance=True)
            if not self._run.trace(0).calls_again(index, self._call - 1):
                del self._repeated[index]

    @property
    def resumable(self) -> bool:
        """Whether all that the next blocks read is stored, and no earlier block is called again."""
        self._repeat()
        return not self._repeated

    def _keep(
        self, number: int, result: Any, objects: dict[int, Any], outputs: _TensorStore
    ) -> None:
        """Store what a block returned and changed, and what later blocks read of earlier ones."""
        trace, tensors = self._run.trace(number), tensors_of(result)
        for slot in trace.carried(self._call + 1):
            if slot.call == self._call:
                outputs.put((number, slot), tensors[slot.leaf])
            else:
                outputs.take_over((number, slot), self._store)
        for shared in trace.changing(self._call + 1):
            if shared in objects:
                self._texts[number, shared], members = written(objects[shared])
                for place, member in enumerate(members):
                    outputs.put((number, shared, place), member)
            elif (number, shared) in self._texts:
                for place in range(tensors_in(self._texts[number, shared])):
                    outputs.take_over((number, shared, place), self._store)

    def behind(self, number: int, end: Callable[[Tensor], Tensor]) -> Reply:
        """Results of the blocks with which a model goes on behind them, from its own; collective.

        These hidden states are what the last block returned.

        Args:
            number: of the micro-batch that the model will be run on.
            end: what is done to the hidden states.

        Returns: gives what a block returned, as far as anything behind the blocks reads it.
        """
        self._repeat()
        trace = self._run.trace(number)
        slots = {slot: self._stored(number, slot) for slot in trace.carried(len(trace.calls))}
        last = Slot(len(trace.calls) - 1)
        slots[last] = end(slots[last])
        calls = iter(enumerate(trace.calls))

        def reply(_index: int, _block: nn.Module, _args: Any, _kwargs: Any) -> Any:
            call, recorded = next(calls)
            unread = partial(torch.zeros, device=self.device)
            return recorded.result(
                lambda leaf, example: (
                    slots[Slot(call, leaf)]
                    if Slot(call, leaf) in slots
                    else unread(example.shape, dtype=example.dtype)
                )
            )

        return reply


@dataclass(frozen=True)
class _Inputs:
    """What a call of a block needs of one micro-batch.

    Attributes:
        slots: what earlier blocks returned.
        constants: those that depend on the tokens, by number.
        shared: the content of objects that earlier blocks have changed, by number.
    """

    slots: dict[Slot, Tensor]
    constants: dict[int, Tensor]
    shared: dict[int, list[Any]]


class _Stopped(Exception):
    """Stops a forward once the inputs to observe have been seen."""


def _check_order(trace: Trace, plan: Plan) -> None:
    """Raise UnsupportedModelError unless the first calls of the blocks are in their order."""
    blocks = list(dict.fromkeys(call.block for call in trace.calls))
    if not blocks or blocks != sorted(blocks):
        called = f"calls its blocks in the order {blocks}" if blocks else "calls no block"
        raise UnsupportedModelError(
            f"the decoder '{plan.parts.decoder}' {called}: calibration takes a model through its "
            "blocks one after another; use a recipe without calibration, and check=False"
        )


def _check_same_blocks(trace: Trace, others: Iterable[Trace]) -> None:
    """Raise CalibrationError where micro-batches go through different blocks.

    Some models skip blocks of cross-attention where there is no image.
    """
    called = [call.block for call in trace.calls]
    if any([call.block for call in other.calls] != called for other in others):
        raise CalibrationError(
            "the model takes rows with images through other blocks than rows without: give rows "
            "of one kind"
        )


@contextmanager
def _adding(decoder: nn.Module, rotate: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Context in which the features are rotated that a decoder adds between its blocks."""

    def rotated(_decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs if rotate is None else with_rotated_features(kwargs, rotate)

    hook = decoder.register_forward_pre_hook(rotated, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _named(batch: Batch) -> Iterator[None]:
    """Context in which what the model raises for a batch with images names the batch."""
    try:
        yield
    except (SmoothqError, HeadReached):
        raise
    except Exception as error:
        if not batch.features:
            raise
        raise CalibrationError(
            f"{batch.where}: the model cannot run on it, with {', '.join(batch.features)}: "
            f"{first_line(error)}"
        ) from error


def _check_finite(statistic: Tensor, where: str) -> None:
    if not torch.isfinite(statistic).all():
        raise NumericsError(f"{where} holds NaN or Inf on the calibration text")
