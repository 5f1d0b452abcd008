"""Outliers in the inputs of a model's linears, by block and site, under each method.

Each method (SmoothQuant, QuaRot, ...) transforms a copy of every block without changing what it
computes, and the inputs of its linears are recorded as the input quantizer sees them. Definitions:
a *channel-wise* outlier is large at every token, a *spike* at one token only (RRS, arXiv
2409.20361, section 3); a token with *massive activations* has a value of a thousand times the
median (arXiv 2402.17762, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.positions import within_positions
from ..checkpoint.source import Source, unload_module
from ..data.tokens import micro_batches
from ..errors import RecipeError
from ..kernels.reference import group_multipliers
from ..modules import InputQuantizer
from ..moved import also_named
from ..pipeline.block_tuning import relative
from ..pipeline.ends import Block, embed_tokens, load_block
from ..pipeline.hidden_states import HiddenStates
from ..pipeline.quantize_block import transform_block
from ..plan.plan import Plan, SitePlan
from ..plan.resolve import resolve
from ..plan.wiring import Wiring
from ..progress import Progress
from ..recipe.presets import preset
from ..recipe.recipe import Method, Preset
from ..rounding.rtn import round_to_nearest
from ..runtime.device import resolve_device
from ..runtime.distributed import World
from ..transforms.hadamard import Hadamard
from ..transforms.rotation import rotate_input

METHODS: dict[Method, str] = {
    "rtn": "as it is",
    "smoothquant": "SmoothQuant",
    "quarot": "QuaRot",
    "smoothrot": "SmoothRot",
    "rs": "RS",
    "rrs": "RRS",
}
# A channel is an outlier if its median magnitude is over so many times the median channel's.
CHANNEL_RATIO = 8.0
# A value is a spike if it is over so many times the median magnitude, of its channel and of all.
SPIKE_RATIO = 100.0
# A value is a massive activation if it is over so many times the median magnitude.
MASSIVE_RATIO = 1000.0
SURFACE = 128  # cells of a surface, at most, along tokens and along channels
MEDIAN_TOKENS = 512  # tokens that medians are taken of, at most, evenly spaced
ERROR_TOKENS = 512  # first tokens on which the error of a site's outputs is measured


@dataclass(frozen=True)
class Profile:
    """Statistics of a site's input under one method.

    Attributes:
        largest: largest magnitude.
        median: median magnitude, of at most 512 tokens.
        kurtosis: of all values; 3 for a normal distribution, 0 if all values are the same.
        channels: number of channel-wise outliers.
        spikes: number of values that are spikes.
        massive: tokens with massive activations, by their index in the flattened text; empty for
            experts.
        error: relative error ‖ŷ − y‖ / ‖y‖ of the site's outputs, root mean square over tokens,
            with weights rounded to nearest and inputs quantized.
        surface: magnitudes, float32 (T', K') with T', K' ≤ 128: each cell is the largest one of a
            chunk of tokens and channels.
    """

    largest: float
    median: float
    kurtosis: float
    channels: int
    spikes: int
    massive: tuple[int, ...]
    error: float
    surface: Tensor

    def peak(self) -> float:
        """The largest magnitude over the median one."""
        return self.largest / self.median if self.median else self.largest

    def figures(self) -> dict[str, object]:
        """All fields but the surface, as plain data."""
        return {name: value for name, value in vars(self).items() if name != "surface"}


@dataclass(frozen=True)
class SiteReport:
    """One site of one block, with a profile by method.

    Attributes:
        block: index of the block.
        site: name of the site within the block.
        width: channels of its input.
        profiles: the statistics under each method; `rtn` leaves the input as it is.
    """

    block: int
    site: str
    width: int
    profiles: dict[Method, Profile]

    @property
    def peak(self) -> float:
        """The largest magnitude over the median one, without a transform."""
        return self.profiles["rtn"].peak()

    @property
    def best(self) -> Method:
        """The method with the least error of the outputs."""
        return min(self.profiles, key=lambda method: self.profiles[method].error)


@dataclass(frozen=True)
class Inspection:
    """The inputs of a model's linears, site by site.

    Attributes:
        model: its name.
        bits: preset whose number formats the errors are measured with, such as `w4a4`.
        tokens: the text, int64 (sequences, length).
        methods: the methods that were compared.
        sites: the sites of all blocks in the order of execution.
    """

    model: str
    bits: Preset
    tokens: Tensor
    methods: tuple[Method, ...]
    sites: tuple[SiteReport, ...]

    def worst_first(self) -> list[SiteReport]:
        """All sites, the highest peak first."""
        return sorted(self.sites, key=lambda site: site.peak, reverse=True)

    def worst(self) -> SiteReport:
        """The site with the highest peak."""
        return max(self.sites, key=lambda site: site.peak)

    def site(self, block: int, site: str | None) -> SiteReport:
        """The report of a site.

        Args:
            block: index of the block.
            site: name of the site; None for the one with the block's highest peak.

        Raises:
            RecipeError: the block has no such site.
        """
        candidates = [s for s in self.sites if s.block == block and site in (None, s.site)]
        if not candidates:
            names = ", ".join(dict.fromkeys(report.site for report in self.sites))
            raise RecipeError(f"block {block} has no site '{site}'; sites are {names}")
        return max(candidates, key=lambda site: site.peak)

    of = also_named("of", site)


@torch.no_grad()
def inspect_model(
    source: Source,
    tokens: Tensor,
    bits: Preset = "w4a4",
    seed: int = 0,
    progress: Progress | None = None,
    device: str = "auto",
) -> Inspection:
    """Record the inputs of every linear of a float model under each method, block by block.

    Only one block is in memory at a time.

    Args:
        source: the float model.
        tokens: int64 (sequences, length); cut to the model's positions.
        bits: preset whose number formats the errors are measured with; the methods with runtime
            smoothing (RS, RRS) exist for `w4a4` only.
        seed: of the rotations.
        progress: called before each block.
        device: where blocks run, such as `cpu` or `cuda`; `auto` is a GPU where there is one.

    Raises:
        SmoothqError: the model cannot be quantized.
    """
    world = World.join(resolve_device(device))
    model = source.skeleton()
    tokens = tokens[:, : within_positions(model, tokens.shape[1], "sequences")]
    wiring, views = Wiring.of(model), list[_View]()
    entered: dict[Hadamard | None, HiddenStates] = {}
    for method in _methods(bits):
        recipe = preset(bits, method).edit(seed=seed, weights__rounding="rtn", weights__clip=False)
        plan = resolve(wiring, recipe)
        if plan.residual_rotation not in entered:
            batches = micro_batches(tokens)
            entered[plan.residual_rotation] = embed_tokens(source, model, plan, batches, world)
        stream = entered[plan.residual_rotation].copy()
        views.append(_View(method, source, model, plan, stream, world.device))
    sites: list[SiteReport] = []
    blocks = len(views[0].plan.blocks)
    for index in range(blocks):
        if progress is not None:
            progress(index, blocks, "watch")
        profiles: dict[str, dict[Method, Profile]] = {}
        for view in views:
            for name, profile in view.block(index).items():
                profiles.setdefault(name, {})[view.method] = profile
        site_plans = views[0].plan.blocks[index].sites
        widths = {site_plan.site.name: site_plan.input.width for site_plan in site_plans}
        sites += [
            SiteReport(index, name, widths[name], by_method)
            for name, by_method in profiles.items()
            if len(by_method) == len(views)
        ]
    methods = tuple(view.method for view in views)
    return Inspection(source.name, bits, tokens, methods, tuple(sites))


def _methods(bits: Preset) -> list[Method]:
    """The methods that exist at a preset's bits."""
    return [method for method in METHODS if bits == "w4a4" or method not in ("rs", "rrs")]


@dataclass(frozen=True)
class _View:
    """A model under one method: its hidden states, advanced block by block.

    Attributes:
        method: by which the model is transformed.
        source: of its weights.
        model: the skeleton of the source.
        plan: of the method.
        stream: hidden states that enter the first block, or the one that is next.
        device: where blocks run.
    """

    method: Method
    source: Source
    model: PreTrainedModel
    plan: Plan
    stream: HiddenStates
    device: torch.device

    def block(self, index: int) -> dict[str, Profile]:
        """Profiles of a block's sites by name; advances the hidden states past the block.

        Sites that no token reached, as of an unused expert, are left out.
        """
        block = load_block(self.source, self.model, self.plan, index, self.device)
        transform_block(block, self.plan, self.stream)
        watched: dict[str, Callable[[Tensor], None]] = {}
        seen: dict[str, list[Tensor]] = {}
        for site_plan in block.plan.sites:
            for token_group in site_plan.site.token_groups:
                watched[token_group[0]] = partial(_keep, seen.setdefault(token_group[0], []))
        self.stream.watch(block.module, index, watched, advance=True)
        profiles = {}
        for plan in block.plan.sites:
            reached = {
                token_group: torch.cat(seen[token_group[0]])
                for token_group in plan.site.token_groups
                if seen[token_group[0]]
            }
            if reached:
                profiles[plan.site.name] = _profile(block, plan, reached)
        unload_module(block.module)
        return profiles


def _keep(batches: list[Tensor], x: Tensor) -> None:
    """Append an input, (..., K), as float32 (tokens, K)."""
    batches.append(x.float().flatten(0, -2))


def _profile(block: Block, plan: SitePlan, token_groups: dict[tuple[str, ...], Tensor]) -> Profile:
    """The profile of a site.

    token_groups: inputs, float32 (tokens, K), by the names of the modules that read them.
    """
    site, quantizer = plan.site, InputQuantizer(plan.site.name, plan.input)
    if plan.input.rotation is not None:
        for reader in site.readers:
            rotate_input(reader.view(block.module), plan.input.rotation)
    x = torch.cat([_as_quantized(quantizer, token_group) for token_group in token_groups.values()])
    magnitudes = x.abs()
    some = magnitudes[:: -(-len(x) // MEDIAN_TOKENS)]
    median, typical = some.flatten().median().item(), some.median(0).values
    spikes = magnitudes > SPIKE_RATIO * typical.clamp(min=median)
    massive = (magnitudes.amax(1) > MASSIVE_RATIO * median).nonzero().flatten()
    return Profile(
        largest=magnitudes.max().item(),
        median=median,
        kurtosis=_kurtosis(x),
        channels=int((typical > CHANNEL_RATIO * typical.median()).sum()),
        spikes=int(spikes.sum()),
        massive=tuple(massive.tolist()) if not site.routed else (),
        error=_output_error(block.module, plan, quantizer, token_groups),
        surface=pooled(magnitudes),
    )


def _as_quantized(quantizer: InputQuantizer, x: Tensor) -> Tensor:
    """An input, float32 (tokens, K), as the quantizer rounds it: rotated, runtime-smoothed."""
    x, spec = quantizer.rotate(x), quantizer.spec
    if spec.mode != "smooth_token":
        return x
    groups = x.unflatten(-1, (-1, spec.group_size))
    multiplier, _ = group_multipliers(groups, spec.bits, spec.clip)
    smoothed: Tensor = groups / multiplier.abs()
    return smoothed.flatten(-2)


def _kurtosis(x: Tensor) -> float:
    """E (x − μ)⁴ / σ⁴ of all values; 0 if all are the same."""
    centred = x - x.mean()
    square = centred.square()
    variance = square.mean().square()
    return float(square.square().mean() / variance) if variance > 0 else 0.0


def pooled(magnitudes: Tensor, cells: int = SURFACE) -> Tensor:
    """Max-pool magnitudes to a grid.

    Args:
        magnitudes: float32 (tokens, K).
        cells: cells of the grid, at most, along tokens and along channels.

    Returns:
        float32 (min(tokens, cells), min(K, cells)).
    """
    sizes = [min(cells, size) for size in magnitudes.shape]
    maxima: Tensor = F.adaptive_max_pool2d(magnitudes[None, None], sizes)
    return maxima[0, 0]


def _output_error(
    block: nn.Module,
    plan: SitePlan,
    quantizer: InputQuantizer,
    token_groups: dict[tuple[str, ...], Tensor],
) -> float:
    """Root mean square of ‖ŷ_t − y_t‖ / ‖y_t‖ over a site's first ERROR_TOKENS tokens."""
    errors = []
    for modules, x in token_groups.items():
        x = x[:ERROR_TOKENS]
        rotated, quantized = quantizer.rotate(x), quantizer.dequantized(x)
        difference = size = torch.zeros(len(x), dtype=torch.float32, device=x.device)
        for module in modules:
            weight = block.get_submodule(module).get_parameter("weight")
            rounded = round_to_nearest(weight, plan.modules[module].grid).dequantize()
            wanted = rotated @ weight.t()
            difference = difference + (quantized @ rounded.t() - wanted).square().sum(1)
            size = size + wanted.square().sum(1)
        errors.append(relative(difference, size))
    return float(torch.cat(errors).mean().sqrt())
