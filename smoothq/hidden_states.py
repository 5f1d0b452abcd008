"""The calibration tokens on their way through the blocks, and what is seen of them there.

`HiddenStates` holds what enters the current block, one micro-batch at a time. A site is observed by
running the block up to the site's first reader and no further. Attention is float here, whatever
the recipe makes of it in the finished model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from .architectures import Site
from .errors import NumericsError
from .modules import InputQuantizer
from .observers import AbsMax, Observer, SecondMoment
from .plan import Plan
from .transforms.hadamard import Hadamard

MICRO_BATCH_TOKENS = 2048  # tokens that one calibration forward takes


class HiddenStates:
    """What enters block `index`: float32 micro-batches (sequences, tokens, hidden_size)."""

    def __init__(self, batches: list[Tensor], arguments: list[dict[int, dict[str, Any]]]) -> None:
        """arguments: for each block, by micro-batch size, what else its forward takes."""
        self._batches, self._arguments = batches, arguments

    @classmethod
    def enter(
        cls,
        model: PreTrainedModel,
        plan: Plan,
        tokens: Tensor,
        rotation: Hadamard | None,
        device: torch.device,
    ) -> HiddenStates:
        """Embed tokens, int64 (samples, length), and record what the base model hands its blocks.

        The embedding must be loaded; the blocks may be on the meta device. rotation: of the
        residual stream, where the embedding itself has not been rotated. device: where the blocks
        will run; the embedding runs on the CPU.
        """
        base, embedding = (
            model.get_submodule(name) for name in (plan.family.base, plan.family.embedding)
        )
        recorders = [_Recorder(last=i == len(plan.blocks) - 1) for i in range(len(plan.blocks))]
        attribute = plan.family.layers.removeprefix(f"{plan.family.base}.")
        blocks = base.get_submodule(attribute)
        base.set_submodule(attribute, nn.ModuleList(recorders))
        batches = []
        try:
            for batch in tokens.split(max(1, MICRO_BATCH_TOKENS // tokens.shape[1])):
                embedded = embedding(batch).float()
                if rotation is not None:
                    embedded = rotation.apply(embedded)
                batches.append(embedded)
                _run_until_stopped(base, inputs_embeds=embedded, use_cache=False)
        finally:
            base.set_submodule(attribute, blocks)
        arguments = [recorder.arguments for recorder in recorders]
        return cls(*tree_map_only(Tensor, lambda tensor: tensor.to(device), (batches, arguments)))

    def copy(self) -> HiddenStates:
        """The same states, to be moved through other blocks."""
        return HiddenStates(list(self._batches), self._arguments)

    def observe_together(
        self, block: nn.Module, name: str, index: int, sites: list[Site], advance: bool
    ) -> dict[str, Tensor]:
        """max_t |x_tk| at several sites in one forward, by site name.

        For a block whose weights are still float. advance: move past the block as well. Raises
        NumericsError naming a site whose input is not finite.
        """
        observers: dict[str, AbsMax] = {}
        handles = []

        def watch(site: Site) -> None:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen = observers.setdefault(site.name, AbsMax(args[0].shape[-1]))
                seen.update(args[0].flatten(0, -2))

            reader = block.get_submodule(site.modules[0])
            handles.append(reader.register_forward_pre_hook(hook))

        for site in sites:
            watch(site)
        for i, batch in enumerate(self._batches):
            output = self.forward(block, index, batch)
            if advance:
                self._batches[i] = output
        for handle in handles:
            handle.remove()
        maxima = {site: seen.result() for site, seen in observers.items()}
        for site_name, maximum in maxima.items():
            _check_finite(maximum, f"{name}, input of {site_name}")
        return maxima

    def observe(
        self, block: nn.Module, index: int, site: Site, observer: Observer, view: Any
    ) -> Tensor:
        """Update an observer with `view(input)` of one site over all tokens; its result."""
        for x in self._inputs(block, index, site):
            observer.update(view(x).flatten(0, -2))
        return observer.result()

    def calibrate(
        self, block: nn.Module, index: int, site: Site, site_input: InputQuantizer, normalise: bool
    ) -> None:
        """Set an InputQuantizer's calibrated scale, where its mode has one."""
        if site_input.spec.mode in ("static", "calibrated"):
            seen = AbsMax(site_input.spec.width, normalise)
            maxima = self.observe(block, index, site, seen, site_input.rotate)
            _check_finite(maxima, f"input of {site_input.name}")
            site_input.calibrate(maxima)

    def hessian(
        self, block: nn.Module, index: int, site: Site, site_input: InputQuantizer
    ) -> Tensor:
        """Σ x̂ x̂ᵀ of a site's input as its weights will see it, float64 (K, K)."""
        seen = SecondMoment(site_input.spec.width)
        result = self.observe(block, index, site, seen, site_input.dequantized)
        _check_finite(result, f"input of {site_input.name}")
        return result

    def advance(self, block: nn.Module, index: int) -> None:
        """Move past a block: its output becomes what enters the next."""
        for i, batch in enumerate(self._batches):
            self._batches[i] = self.forward(block, index, batch)

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self._batches)

    def batch(self, i: int) -> Tensor:
        """Micro-batch i, float32 (sequences, tokens, hidden_size)."""
        return self._batches[i]

    def forward(self, block: nn.Module, index: int, batch: Tensor) -> Tensor:
        """A block's output for one micro-batch."""
        output = block(batch, **self._arguments[index][batch.shape[0]])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def _inputs(self, block: nn.Module, index: int, site: Site) -> Iterator[Tensor]:
        reader = block.get_submodule(site.modules[0])
        for batch in self._batches:
            caught: list[Tensor] = []

            def stop(module: nn.Module, args: tuple[Tensor, ...], into: Any = caught) -> None:
                into.append(args[0])
                raise _Stopped

            handle = reader.register_forward_pre_hook(stop)
            try:
                _run_until_stopped(block, batch, **self._arguments[index][batch.shape[0]])
            finally:
                handle.remove()
            yield caught[0]


class _Stopped(Exception):
    """Ends a forward whose rest is not needed."""


def _run_until_stopped(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    try:
        module(*args, **kwargs)
    except _Stopped:
        return


class _Recorder(nn.Module):
    """Stands in for a block and keeps what it is called with, by micro-batch size."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self._last = last
        self.arguments: dict[int, dict[str, Any]] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.arguments[hidden.shape[0]] = kwargs
        if self._last:
            raise _Stopped
        return hidden


def _check_finite(statistic: Tensor, where: str) -> None:
    if not torch.isfinite(statistic).all():
        raise NumericsError(f"{where} holds NaN or Inf on the calibration text")
