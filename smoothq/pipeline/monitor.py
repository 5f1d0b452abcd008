"""Perplexity measured during quantization, so that a bad run can be stopped early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.positions import within_positions
from ..checkpoint.source import Source, unload_module
from ..data.tokens import micro_batches
from ..errors import CalibrationError
from ..evaluation.perplexity import perplexity_of, window_loss
from ..plan.plan import Plan
from ..runtime.distributed import World
from .ends import ModelTail, embed_tokens, load_block
from .hidden_states import HiddenStates

LOGITS = 1 << 24  # computed at a time, unless one window has more
STREAM = "probe"  # the name of the monitor's hidden states in a saved state


@dataclass(frozen=True)
class Probe:
    """Perplexity measurements during a quantization.

    Attributes:
        tokens: the token ids on which perplexity is measured, int64 (windows, length).
        every: number of blocks between two measurements.
    """

    tokens: Tensor
    every: int = 1

    def __post_init__(self) -> None:
        if self.tokens.is_floating_point() or self.tokens.dtype == torch.bool:
            raise CalibrationError(f"a probe's tokens must be ids, not {self.tokens.dtype}")
        if self.tokens.dim() != 2 or not len(self.tokens) or self.tokens.shape[1] < 2:
            raise CalibrationError(
                f"a probe's tokens must be (windows, 2 or more), not {tuple(self.tokens.shape)}"
            )
        if self.every < 1:
            raise CalibrationError(f"a probe every {self.every} blocks: it is 1 or more")


@dataclass(frozen=True)
class BlockDone:
    """The event that a block has been quantized and stored.

    Attributes:
        block: the block's number, from 0.
        blocks: how many blocks the model has.
        perplexity: of the model with the blocks so far quantized and the others in float; None if
            it was not measured after this block.
        float_perplexity: of the float model on the same tokens; None without a probe.
    """

    block: int
    blocks: int
    perplexity: float | None = None
    float_perplexity: float | None = None


OnBlock = Callable[[BlockDone], None]


class PerplexityMonitor:
    """Measures perplexity on a probe's tokens while the blocks are being quantized.

    The probe's hidden states are advanced through the quantized blocks. Each measurement loads all
    later blocks in float once more. The head stays loaded in float32.
    """

    def __init__(
        self, probe: Probe, source: Source, model: PreTrainedModel, plan: Plan, world: World
    ) -> None:
        """Embed the probe's tokens and measure the float model's perplexity.

        Args:
            probe: what to measure.
            source: the float checkpoint.
            model: the float model on the meta device; unchanged on return.
            plan: its plan.
            world: the ranks of the run.
        """
        if plan.parts.head is None:
            raise CalibrationError(f"{source.name} predicts no tokens: no probe can measure it")
        length = within_positions(model, probe.tokens.shape[1], "the probe's windows")
        self._tokens, self._every = probe.tokens[:, :length].long(), probe.every
        self._source, self._model, self._plan, self._world = source, model, plan, world
        rows = model.get_submodule(plan.parts.embedding).get_parameter("weight").shape[0]
        windows = max(1, LOGITS // (length * rows))
        batches = [few for batch in micro_batches(self._tokens) for few in batch.split(windows)]
        self.stream = embed_tokens(source, model, plan, batches, world)
        self._end = ModelTail(source, plan, self.stream)
        self.float_perplexity = self._perplexity(self.stream.copy(), first=0)

    def follow(self, block: nn.Module, index: int) -> float | None:
        """Advance the probe's hidden states through a quantized block, and measure if it is time.

        Args:
            block: the quantized block.
            index: its number in the model.

        Returns: the perplexity after every `probe.every` blocks and after the last, else None.
        """
        self.stream.advance(block, index)
        if (index + 1) % self._every and index + 1 < len(self._plan.blocks):
            return None
        return self._perplexity(self.stream.copy(), index + 1)

    def _perplexity(self, stream: HiddenStates, first: int) -> float:
        for index in range(first, len(self._plan.blocks)):
            block = load_block(self._source, self._model, self._plan, index, self._world.device)
            stream.advance(block.module, index)
            unload_module(block.module)
        losses = [
            window_loss(logits, window)
            for number, batch in enumerate(stream.batches)
            for logits, window in zip(self._end.logits(stream, number), batch.tokens, strict=True)
        ]
        windows, length = self._tokens.shape
        return perplexity_of(sum(losses), windows * (length - 1))
