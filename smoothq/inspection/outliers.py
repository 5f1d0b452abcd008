"""What a model's linears are fed: outliers by block and site, before and after each transform.

Each method transforms its own copy of a block, which computes the same, and its inputs are watched
as their quantizer will see them. Definitions: a *channel-wise* outlier is large at every token, a
*spike* at one token only (RRS, arXiv 2409.20361, section 3); a token of *massive activations* holds
a value a thousand times the median (arXiv 2402.17762, section 2).
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
from ..checkpoint.source import Source, skeleton, unload_module
from ..data.tokens import micro_batches
from ..errors import RecipeError
from ..kernels.reference import group_multipliers
from ..modules import InputQuantizer, SequenceContext
from ..pipeline.block_tuning import relative
from ..pipeline.ends import Block, embed_tokens, load_block
from ..pipeline.hidden_states import HiddenStates
from ..pipeline.run import transform_block
from ..plan.plan import Plan, SitePlan
from ..plan.resolve import make_plan
from ..progress import Progress
from ..recipe.presets import preset
from ..recipe.recipe import Method, Preset
from ..rounding.rtn import round_to_nearest
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
CHANNEL_RATIO = 8.0  # times the median channel's median magnitude: a channel-wise outlier
SPIKE_RATIO = 100.0  # times the median magnitude of its channel, and of all: a spike
MASSIVE_RATIO = 1000.0  # times the median magnitude: a massive activation
SURFACE = 128  # tokens and channels of a surface, at most
MEDIAN_TOKENS = 512  # of which medians are taken, evenly spaced
ERROR_TOKENS = 512  # on which the error of a site's outputs is measured


@dataclass(frozen=True)
class Profile:
    """What a site is fed, under one method.

    largest, median: of the magnitudes; medians are of 512 tokens at most. kurtosis: of all values;
    3 is a normal distribution's, 0 stands for values that are all the same. channels, spikes: how
    many outliers of either kind. massive: tokens, by their number in the text. error: ‖ŷ − y‖ / ‖y‖
    of what the site's linears make of a token, weights rounded to nearest and inputs quantized.
    surface: largest magnitudes of (tokens, channels), in at most 128 stretches of each.
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
        """The largest value in units of the median."""
        return self.largest / self.median if self.median else self.largest

    def figures(self) -> dict[str, object]:
        """Everything but the surface, as plain data."""
        return {name: value for name, value in vars(self).items() if name != "surface"}


@dataclass(frozen=True)
class SiteReport:
    """One site of one block, with a profile by method."""

    block: int
    site: str
    width: int
    profiles: dict[Method, Profile]

    @property
    def peak(self) -> float:
        """The largest value as it is, in units of the median."""
        return self.profiles["rtn"].peak()

    @property
    def best(self) -> Method:
        """The method with the least error."""
        return min(self.profiles, key=lambda method: self.profiles[method].error)


@dataclass(frozen=True)
class Inspection:
    """A model's sites in the order of execution. bits: at which errors are measured."""

    model: str
    bits: Preset
    tokens: Tensor
    methods: tuple[Method, ...]
    sites: tuple[SiteReport, ...]

    def worst_first(self) -> list[SiteReport]:
        """All sites by their largest value, in units of its median."""
        return sorted(self.sites, key=lambda site: site.peak, reverse=True)

    def worst(self) -> SiteReport:
        """The first of them."""
        return max(self.sites, key=lambda site: site.peak)

    def of(self, block: int, site: str | None) -> SiteReport:
        """A site by block and name; without a name the block's worst. Raises RecipeError."""
        found = [s for s in self.sites if s.block == block and site in (None, s.site)]
        if not found:
            names = ", ".join(dict.fromkeys(each.site for each in self.sites))
            raise RecipeError(f"block {block} has no site '{site}'; sites are {names}")
        return max(found, key=lambda site: site.peak)


@torch.no_grad()
def inspect_model(
    source: Source,
    tokens: Tensor,
    bits: Preset = "w4a4",
    seed: int = 0,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Inspection:
    """Watch the inputs of every linear of a float model, one block in memory at a time.

    tokens: int64 (sequences, length). bits: of the number formats whose error is measured; runtime
    smoothing is there with w4a4 alone. seed: of the rotations. Raises SmoothqError for a model that
    cannot be taken.
    """
    world = World.join(device)
    model = skeleton(source)
    tokens = tokens[:, : within_positions(model, tokens.shape[1], "sequences")]
    views: list[_View] = []
    entered: dict[Hadamard | None, HiddenStates] = {}
    for method in _methods(bits):
        recipe = preset(bits, method).edit(seed=seed, weights__rounding="rtn", weights__clip=False)
        plan = make_plan(model, recipe)
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
        widths = {each.site.name: each.input.width for each in views[0].plan.blocks[index].sites}
        whole = {name: each for name, each in profiles.items() if len(each) == len(views)}
        sites += [SiteReport(index, name, widths[name], each) for name, each in whole.items()]
    methods = tuple(view.method for view in views)
    return Inspection(source.name, bits, tokens, methods, tuple(sites))


def _methods(bits: Preset) -> list[Method]:
    """The methods that exist at some bits."""
    return [method for method in METHODS if bits == "w4a4" or method not in ("rs", "rrs")]


class _View:
    """A model under one method, on its way from block to block."""

    def __init__(
        self,
        method: Method,
        source: Source,
        model: PreTrainedModel,
        plan: Plan,
        stream: HiddenStates,
        device: torch.device,
    ) -> None:
        """model: the skeleton of the source. stream: what enters its blocks, as the plan has it."""
        self.method, self.plan = method, plan
        self._source, self._model, self._stream, self._device = source, model, stream, device

    def block(self, index: int) -> dict[str, Profile]:
        """The profiles of a block's sites by name; moves past the block.

        Experts that no token reached have none.
        """
        block = load_block(self._source, self._model, self.plan, index, self._device)
        transform_block(block, self.plan, self._stream)
        watched: dict[str, Callable[[Tensor], None]] = {}
        seen: dict[str, list[Tensor]] = {}
        for site_plan in block.plan.sites:
            for token_group in site_plan.site.token_groups:
                watched[token_group[0]] = partial(_keep, seen.setdefault(token_group[0], []))
        self._stream.watch(block.module, index, watched, advance=True)
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
    batches.append(x.float().flatten(0, -2))


def _profile(block: Block, plan: SitePlan, token_groups: dict[tuple[str, ...], Tensor]) -> Profile:
    """lanes: what modules of the site were fed, float32 (tokens, K)."""
    site, quantizer = plan.site, InputQuantizer(plan.site.name, plan.input, 1, SequenceContext())
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
    """An input, float32 (tokens, K), as its codes see it: rotated, and runtime-smoothed."""
    x, spec = quantizer.rotate(x), quantizer.spec
    if spec.mode != "groups":
        return x
    groups = x.unflatten(-1, (-1, spec.group_size))
    multiplier, _ = group_multipliers(groups, spec.bits, spec.clip)
    smoothed: Tensor = groups / multiplier.abs()
    return smoothed.flatten(-2)


def _kurtosis(x: Tensor) -> float:
    """E (x − μ)⁴ / σ⁴ of all values; 0 where all are the same."""
    centred = x - x.mean()
    square = centred.square()
    variance = square.mean().square()
    return float(square.square().mean() / variance) if variance > 0 else 0.0


def pooled(magnitudes: Tensor, cells: int = SURFACE) -> Tensor:
    """The largest magnitudes of at most so many stretches of tokens and of channels, (T', K')."""
    sizes = [min(cells, size) for size in magnitudes.shape]
    found: Tensor = F.adaptive_max_pool2d(magnitudes[None, None], sizes)
    return found[0, 0]


def _output_error(
    block: nn.Module,
    plan: SitePlan,
    quantizer: InputQuantizer,
    token_groups: dict[tuple[str, ...], Tensor],
) -> float:
    """The root mean square over a site's first tokens of ‖ŷ_t − y_t‖ / ‖y_t‖."""
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
