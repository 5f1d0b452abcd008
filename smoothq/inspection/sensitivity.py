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
from ..recipe.presets import preset
from ..recipe.recipe import Activations, Override, Recipe, Weights
from ..runtime.device import resolve_device
from ..runtime.distributed import World

RICH_BITS = 8  # of weights and inputs in the rich format
AS_ASKED, RICH = "as asked", "8 bits"  # names of choices that are no presets
CHUNK_ELEMENTS = 1 << 22  # probabilities that are compared at a time
NO_TARGET = -100  # the target that F.nll_loss ignores


@dataclass(frozen=True)
class Choice:
    """A site of a block, quantized alone in one number format.

    Attributes:
        name: of the format: the preset that has it, AS_ASKED for the recipe's own, or RICH for
            8-bit weights with a scale a channel, and inputs of at least 8 bits.
        bits: total bits of the site's weights, scales included.
        divergence: KL(float ‖ quantized), nats a token.
        perplexity_ratio: perplexity over the float model's.
    """

    name: str
    bits: int
    divergence: float
    perplexity_ratio: float


@dataclass(frozen=True)
class SiteSensitivity:
    """One site of one block, quantized alone.

    Attributes:
        block: index of the block.
        site: name of the site within the block.
        modules: full names of its linears.
        elements: number of their weights.
        choices: its number formats, the recipe's first.
    """

    block: int
    site: str
    modules: tuple[str, ...]
    elements: int
    choices: tuple[Choice, ...]

    @property
    def asked(self) -> Choice:
        """The site as the recipe has it."""
        return self.choices[0]


@dataclass(frozen=True)
class Sensitivities:
    """The sensitivities of all sites of a model.

    Attributes:
        units: one a site, in the order of execution.
        elements: number of weights in all linears of the blocks, float ones included.
        float_bits: total bits of the weights of linears that stay in float.
        perplexity: of the float model on the text.
        tokens: number of tokens of the text.
    """

    units: tuple[SiteSensitivity, ...]
    elements: int
    float_bits: int
    perplexity: float
    tokens: int

    @property
    def ranked(self) -> tuple[SiteSensitivity, ...]:
        """The sites, the largest divergence under the recipe first."""
        return tuple(sorted(self.units, key=lambda unit: unit.asked.divergence, reverse=True))

    @property
    def asked(self) -> list[Choice]:
        """All sites as the recipe has them."""
        return [unit.asked for unit in self.units]

    @property
    def smallest(self) -> list[Choice]:
        """The choice of fewest bits of each site; of equal ones the one that costs least."""
        return [
            min(unit.choices, key=lambda choice: (choice.bits, choice.divergence))
            for unit in self.units
        ]

    @property
    def largest(self) -> list[Choice]:
        """The choice of most bits of each site."""
        return [max(unit.choices, key=lambda choice: choice.bits) for unit in self.units]

    def bits_with(self, chosen: Iterable[Choice]) -> float:
        """Average bits a weight, scales included, with a choice for each of the sites."""
        return (self.float_bits + sum(choice.bits for choice in chosen)) / self.elements

    def choose(self, budget_bits: float) -> list[Choice]:
        """Choose a format for each site greedily, within a budget.

        From the smallest formats on, the choice is taken that saves most divergence an extra bit,
        as long as one fits.

        Args:
            budget_bits: average bits a weight that are not exceeded, scales included.
        """
        chosen, bits = self.smallest, self.float_bits + sum(choice.bits for choice in self.smallest)
        while True:
            most, best = 0.0, None
            for index, (unit, now) in enumerate(zip(self.units, chosen, strict=True)):
                for choice in unit.choices:
                    extra, saved = choice.bits - now.bits, now.divergence - choice.divergence
                    fits = (bits + extra) / self.elements <= budget_bits
                    if extra > 0 and fits and saved / extra > most:
                        most, best = saved / extra, (index, choice, extra)
            if best is None:
                return chosen
            index, choice, extra = best
            chosen[index], bits = choice, bits + extra


@torch.no_grad()
def measure(
    source: Source,
    recipe: Recipe,
    tokens: Tensor,
    progress: Progress | None = None,
    device: str = "auto",
    among: Iterable[str] = (),
) -> Sensitivities:
    """Quantize every site of a model alone, in each format, and compare with the float model.

    In memory are the float32 model, the hidden states that enter each block, and the logits of all
    tokens. Each site takes a forward from its block to the end of the model for each format.

    Args:
        source: the float model.
        recipe: how sites are quantized.
        tokens: int64 (windows, length), for calibration of the recipe's smoothing and for the
            comparison; cut to the model's positions.
        progress: called before each site.
        device: where the model runs, such as `cpu` or `cuda`; `auto` is a GPU where there is one.
        among: presets whose number formats a site may have besides the recipe's own; everything
            else is the recipe's. Without any it is RICH, where that takes more bits.

    Raises:
        SmoothqError: a preset is unknown, or the model cannot be quantized.
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
    among = tuple(dict.fromkeys(name.lower() for name in among))
    others = {
        name: resolve(
            plan.wiring,
            plan.recipe.edit(overrides=(_override(recipe, "*", name), *recipe.overrides)),
        )
        for name in among or (RICH,)
    }
    if progress is not None:
        progress(0, len(plan.blocks), "float forward")
    floats = _FloatModel(source, plan, tokens, torch.device(device))
    units = []
    for index, block in enumerate(plan.blocks):
        for place, site in enumerate(block.sites):
            if progress is not None:
                progress(index, len(plan.blocks), f"measure {site.site.name}")
            choices = [Choice(AS_ASKED, site.stored_bits, *floats.losses(index, site))]
            for name, other in others.items():
                another = other.blocks[index].sites[place]
                more = another.stored_bits > site.stored_bits
                if another != site and (more or name != RICH):
                    losses = floats.losses(index, another)
                    choices.append(Choice(name, another.stored_bits, *losses))
            unit = SiteSensitivity(
                block=index,
                site=site.site.name,
                modules=tuple(f"{plan.parts.block_name(index)}.{name}" for name in site.modules),
                elements=site.elements,
                choices=tuple(choices),
            )
            units.append(unit)
    float_elements = sum(block.kept_elements for block in plan.blocks)
    return Sensitivities(
        units=tuple(units),
        elements=sum(unit.elements for unit in units) + float_elements,
        float_bits=8 * plan.stored_dtype.itemsize * float_elements,
        perplexity=perplexity_of(floats.loss, 1),
        tokens=tokens.numel(),
    )


def mixed_recipe(sensitivities: Sensitivities, recipe: Recipe, budget_bits: float) -> Recipe:
    """A recipe with the formats that cost least within a budget, as `Sensitivities.choose`.

    Args:
        sensitivities: what `measure` returned.
        recipe: the recipe that was measured, or one that differs in rounding, tuning or
            calibration.
        budget_bits: average bits a weight that are not exceeded, scales included.

    Raises:
        RecipeError: the budget is below the bits of the smallest formats, or each site has one
            format alone.
    """
    least = sensitivities.bits_with(sensitivities.smallest)
    most = sensitivities.bits_with(sensitivities.largest)
    if all(len(unit.choices) == 1 for unit in sensitivities.units):
        raise RecipeError(
            f"recipe '{recipe.name}' has {least:.2f} bits a weight, {RICH_BITS}-bit weights would "
            "take no more, and no other format was measured: there is nothing to choose; name "
            "presets to choose among"
        )
    if not budget_bits >= least:
        raise RecipeError(
            f"a budget of {budget_bits:g} bits a weight is below what the smallest formats take; "
            f"give one from {math.ceil(least * 1e4) / 1e4:.4f}, which is these everywhere, to "
            f"{most:.4f}, which is enough for the largest everywhere"
        )
    return with_choices(recipe, sensitivities, sensitivities.choose(budget_bits))


def with_choices(recipe: Recipe, sensitivities: Sensitivities, chosen: Iterable[Choice]) -> Recipe:
    """A recipe with an override for each format that is not its own.

    Args:
        recipe: the recipe that is extended; its overrides stay, after the new ones.
        sensitivities: the sites.
        chosen: a choice of each.
    """
    by_name: dict[str, list[SiteSensitivity]] = {}
    for unit, choice in zip(sensitivities.units, chosen, strict=True):
        if choice.name != AS_ASKED:
            by_name.setdefault(choice.name, []).append(unit)
    overrides = [
        _override(recipe, pattern, name)
        for name, units in by_name.items()
        for pattern in _patterns(units)
    ]
    return recipe.edit(name=f"{recipe.name}-mixed", overrides=(*overrides, *recipe.overrides))


def _override(recipe: Recipe, match: str, name: str) -> Override:
    """An override to the format of a choice, rounded as the recipe's own."""
    rounding = recipe.weights.rounding
    if name != RICH:
        formats = preset(name)
        return Override(
            match=match,
            weights=formats.weights.model_copy(update={"rounding": rounding}),
            activations=formats.activations,
            runtime_smoothing=formats.runtime_smoothing,
        )
    weights = Weights(bits=RICH_BITS, rounding=rounding)
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
