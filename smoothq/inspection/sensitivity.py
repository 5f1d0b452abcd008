"""What quantizing each site of each block alone costs, and a mixed-precision recipe from that.

One site is quantized in a float model whose blocks are transformed as the recipe says, and the
model's predictions are compared with the float ones. Weights are rounded to nearest and products
are computed in float. On the same grids integer kernels compute the same function, so the figures
hold for the recipe, except for what GPTQ and tuning recover. A divergence grows with the square of
a small error, and errors of different sites are hardly correlated, so the divergences of sites
quantized alone roughly add up, and sites can be chosen by them. Attention and KV cache stay float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures.positions import within_positions
from ..checkpoint.source import Source
from ..data.tokens import micro_batches
from ..errors import CalibrationError, NumericsError, RecipeError
from ..evaluation.divergence import summed_divergence
from ..evaluation.perplexity import perplexity_of
from ..modules import InputQuantizer
from ..pipeline.alpha_search import quantize_linear
from ..pipeline.ends import ModelTail, embed_tokens, load_block
from ..pipeline.quantize_block import transform_block
from ..plan.plan import Plan, SitePlan
from ..plan.resolve import make_plan, resolve
from ..progress import Progress
from ..recipe.recipe import Activations, Override, Recipe, Weights
from ..runtime.device import resolve_device
from ..runtime.distributed import World

RICH_BITS = 8  # of weights and inputs in the rich format
CHUNK_ELEMENTS = 1 << 22  # probabilities that are compared at a time
NO_TARGET = -100  # the target that F.nll_loss ignores


@dataclass(frozen=True)
class SiteSensitivity:
    """One site of one block, quantized alone: as the recipe has it, and in the rich format.

    The rich format is 8-bit weights with a scale a channel, and inputs of at least 8 bits with a
    scale a token.

    Attributes:
        block: index of the block.
        site: name of the site within the block.
        modules: full names of its linears.
        elements: number of their weights.
        bits: total bits of their weights as the recipe has them, scales included.
        rich_bits: total bits of their weights in the rich format, scales included.
        divergence: KL(float ‖ quantized) as the recipe has it, nats a token.
        rich_divergence: KL(float ‖ quantized) in the rich format, nats a token.
        perplexity_ratio: perplexity as the recipe has it over the float model's.
    """

    block: int
    site: str
    modules: tuple[str, ...]
    elements: int
    bits: int
    rich_bits: int
    divergence: float
    rich_divergence: float
    perplexity_ratio: float

    @property
    def extra_bits(self) -> int:
        """Bits that the rich format takes more than the recipe's."""
        return self.rich_bits - self.bits

    @property
    def saved(self) -> float:
        """Divergence that the rich format avoids, nats a token."""
        return self.divergence - self.rich_divergence


@dataclass(frozen=True)
class Sensitivities:
    """The sensitivities of all sites of a model.

    Attributes:
        units: one a site, in the order of execution.
        elements: number of weights in all linears of the blocks, float ones included.
        bits: total bits of these weights under the recipe, scales included.
        perplexity: of the float model on the text.
        tokens: number of tokens of the text.
    """

    units: tuple[SiteSensitivity, ...]
    elements: int
    bits: int
    perplexity: float
    tokens: int

    @property
    def ranked(self) -> tuple[SiteSensitivity, ...]:
        """The sites, the largest divergence first."""
        return tuple(sorted(self.units, key=lambda unit: unit.divergence, reverse=True))

    def bits_with(self, rich: Iterable[SiteSensitivity]) -> float:
        """Average bits a weight, scales included, with the sites of `rich` in the rich format."""
        return (self.bits + sum(unit.extra_bits for unit in rich)) / self.elements

    def fitting(
        self, units: Iterable[SiteSensitivity], budget_bits: float
    ) -> list[SiteSensitivity]:
        """Choose sites for the rich format greedily, within a budget.

        Args:
            units: candidates, in the order in which they are tried.
            budget_bits: average bits a weight that are not exceeded, scales included.

        Returns:
            The candidates that fit, in their order.
        """
        chosen: list[SiteSensitivity] = []
        for unit in units:
            if self.bits_with([*chosen, unit]) <= budget_bits:
                chosen.append(unit)
        return chosen


@torch.no_grad()
def measure(
    source: Source,
    recipe: Recipe,
    tokens: Tensor,
    progress: Progress | None = None,
    device: str = "auto",
) -> Sensitivities:
    """Quantize every site of a model alone, in two formats, and compare with the float model.

    In memory are the float32 model, the hidden states that enter each block, and the logits of all
    tokens. Each site takes two forwards from its block to the end of the model.

    Args:
        source: the float model.
        recipe: how sites are quantized.
        tokens: int64 (windows, length), for calibration of the recipe's smoothing and for the
            comparison; cut to the model's positions.
        progress: called before each site.
        device: where the model runs, such as `cpu` or `cuda`; `auto` is a GPU where there is one.

    Raises:
        SmoothqError: the model cannot be quantized.
        CalibrationError: `tokens` is of another shape.
        NumericsError: the float model's loss is NaN or Inf.
    """
    device = resolve_device(device)
    if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise CalibrationError(
            f"tokens must be (windows, length of 2 or more), not {tuple(tokens.shape)}"
        )
    model = source.skeleton()
    tokens = tokens[:, : within_positions(model, tokens.shape[1], "windows")]
    plan = make_plan(model, recipe)
    rich = resolve(plan.wiring, recipe.edit(overrides=(_rich(recipe, "*"), *recipe.overrides)))
    if progress is not None:
        progress(0, len(plan.blocks), "float forward")
    floats = _FloatModel(source, plan, tokens, torch.device(device))
    units = []
    for index, (block, richer) in enumerate(zip(plan.blocks, rich.blocks, strict=True)):
        for site, rich_site in zip(block.sites, richer.sites, strict=True):
            if progress is not None:
                progress(index, len(plan.blocks), f"measure {site.site.name}")
            divergence, ratio = floats.losses(index, site)
            same = rich_site == site
            rich_divergence = divergence if same else floats.losses(index, rich_site)[0]
            unit = SiteSensitivity(
                block=index,
                site=site.site.name,
                modules=tuple(f"{plan.parts.block_name(index)}.{name}" for name in site.modules),
                elements=site.elements,
                bits=site.stored_bits,
                rich_bits=rich_site.stored_bits,
                divergence=divergence,
                rich_divergence=rich_divergence,
                perplexity_ratio=ratio,
            )
            units.append(unit)
    kept = sum(block.kept_elements for block in plan.blocks)
    return Sensitivities(
        units=tuple(units),
        elements=sum(unit.elements for unit in units) + kept,
        bits=sum(unit.bits for unit in units) + 8 * plan.stored_dtype.itemsize * kept,
        perplexity=perplexity_of(floats.loss, 1),
        tokens=tokens.numel(),
    )


def mixed_recipe(sensitivities: Sensitivities, recipe: Recipe, budget_bits: float) -> Recipe:
    """A recipe with the most sensitive sites in the rich format, within a budget.

    Sites are taken by divergence saved per extra bit, as long as they fit.

    Args:
        sensitivities: what `measure` returned.
        recipe: the recipe that was measured, or one that differs in rounding, tuning or
            calibration.
        budget_bits: average bits a weight that are not exceeded, scales included.

    Raises:
        RecipeError: the budget is below the bits that `recipe` takes, or all weights have the
            bits of the rich format already.
    """
    candidates = [unit for unit in sensitivities.units if unit.extra_bits > 0]
    least, most = sensitivities.bits_with(()), sensitivities.bits_with(candidates)
    if not candidates:
        raise RecipeError(
            f"recipe '{recipe.name}' has {least:.2f} bits a weight, and {RICH_BITS}-bit weights "
            "would take no more: there is nothing to choose"
        )
    if not budget_bits >= least:
        raise RecipeError(
            f"a budget of {budget_bits:g} bits a weight is below what recipe '{recipe.name}' takes "
            f"itself; give one from {math.ceil(least * 1e4) / 1e4:.4f}, which changes nothing, "
            f"to {most:.4f}, which is {RICH_BITS} bits everywhere"
        )
    worth = [unit for unit in candidates if unit.saved > 0]
    worth.sort(key=lambda unit: unit.saved / unit.extra_bits, reverse=True)
    return enriched(recipe, sensitivities.fitting(worth, budget_bits))


def enriched(recipe: Recipe, units: Iterable[SiteSensitivity]) -> Recipe:
    """A recipe with some sites in the rich format.

    Args:
        recipe: the recipe that is extended; its overrides stay, after the new ones.
        units: the sites.
    """
    overrides = [_rich(recipe, pattern) for pattern in _patterns(units)]
    return recipe.edit(name=f"{recipe.name}-mixed", overrides=(*overrides, *recipe.overrides))


def _rich(recipe: Recipe, match: str) -> Override:
    """An override to the rich format; inputs that have 8 bits or more stay as they are."""
    weights = Weights(bits=RICH_BITS, rounding=recipe.weights.rounding)
    few = recipe.activations.bits < RICH_BITS
    activations = Activations(bits=RICH_BITS) if few else None
    return Override(match=match, weights=weights, activations=activations)


def _patterns(units: Iterable[SiteSensitivity]) -> list[str]:
    """Shell patterns of the sites' modules; one pattern covers a module in up to ten blocks."""
    digits: dict[tuple[str, str], list[int]] = {}
    for unit in sorted(units, key=lambda unit: unit.block):
        tens, digit = divmod(unit.block, 10)
        for name in unit.modules:
            before, after = name.split(f".{unit.block}.", 1)
            digits.setdefault((f"{before}.{tens or ''}", after), []).append(digit)
    return [
        f"{before}{last[0] if len(last) == 1 else str(last).replace(', ', '')}.{after}"
        for (before, after), last in digits.items()
    ]


class _FloatModel:
    """A float model in memory, transformed as its plan says; one site at a time is quantized.

    loss: its mean negative log-likelihood of a next token, in nats.
    """

    def __init__(self, source: Source, plan: Plan, tokens: Tensor, device: torch.device) -> None:
        if plan.parts.head is None:
            raise CalibrationError(f"{source.name} predicts no tokens: it has no perplexity")
        self._plan, self._device = plan, device
        batches = micro_batches(tokens)
        self._targets = [
            F.pad(batch[:, 1:], (0, 1), value=NO_TARGET).flatten().to(device) for batch in batches
        ]
        model = source.skeleton()
        stream = embed_tokens(source, model, plan, batches, World(0, 1, device))
        self._entering = [stream]
        self._blocks: list[nn.Module] = []
        for index in range(len(plan.blocks)):
            block = load_block(source, model, plan, index, device)
            transform_block(block, plan, stream)
            self._blocks.append(block.module)
            stream = stream.copy()
            stream.advance(block.module, index)
            self._entering.append(stream)
        self._end = ModelTail(source, plan, stream)
        end = len(self._blocks)
        self._reference = [logits.log_softmax(-1) for logits in self._logits(end)]
        _, self.loss = self._compared(end)
        if not math.isfinite(self.loss):
            raise NumericsError(f"{source.name}: the float model's loss on the text is {self.loss}")

    def losses(self, index: int, site: SitePlan) -> tuple[float, float]:
        """Quantize one site of block `index`, and restore its weights afterwards.

        Returns KL(float ‖ quantized) in nats a token, and the perplexity over the float model's.
        """
        block, settings = self._blocks[index], self._plan.recipe.runtime_smoothing
        site_input = InputQuantizer(site.site.name, site.input)
        site_input.to(self._device)
        normalise = settings is not None and settings.normalise
        self._entering[index].calibrate(block, index, site.site, site_input, normalise)
        weights = {name: block.get_submodule(name).get_parameter("weight") for name in site.modules}
        float_weights = {name: weight.clone() for name, weight in weights.items()}
        hooks = [quantize_linear(block, name, site, site_input) for name in site.modules]
        divergence, loss = self._compared(index)
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            weight.copy_(float_weights[name])
        return divergence, perplexity_of(loss - self.loss, 1)

    def _compared(self, first: int) -> tuple[float, float]:
        """Divergence from the float model and mean loss, nats a token, run from block `first`."""
        divergence = loss = 0.0
        for batch in zip(self._logits(first), self._reference, self._targets, strict=True):
            count = max(1, CHUNK_ELEMENTS // batch[0].shape[1])
            for logits, log_p, targets in zip(
                *(tensor.split(count) for tensor in batch), strict=True
            ):
                log_q = logits.log_softmax(-1)
                loss += F.nll_loss(log_q, targets, reduction="sum").item()
                divergence += summed_divergence(log_p, log_q)
        targets = torch.cat(self._targets)
        return divergence / len(targets), loss / int((targets != NO_TARGET).sum())

    def _logits(self, first: int) -> Iterator[Tensor]:
        """Logits of each micro-batch, float32 (tokens, vocabulary).

        Runs from block `first` on, whose input hidden states are in memory.
        """
        stream = self._entering[first]
        for number in range(len(stream)):
            passing = stream.only(number)
            for index in range(first, len(self._blocks)):
                passing.advance(self._blocks[index], index)
            yield self._end.logits(passing, number).flatten(0, 1)
