"""Quantizes one block: transform, calibrate and round site by site, tune."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from torch import Tensor, nn

from ..modules import InputQuantizer, SequenceContext
from ..plan.install import install_inputs, install_linear
from ..plan.plan import Plan, SitePlan
from ..progress import Stage
from ..recipe.recipe import Recipe
from ..rounding.gptq import Factor, factorise, gptq
from ..rounding.grid import QuantizedWeight
from ..rounding.rtn import round_to_nearest
from ..runtime.distributed import World
from ..runtime.mapped import is_mapped, mapped, touch
from ..transforms.rotation import rotate_input, rotate_value_output
from ..transforms.smoothing import smooth
from .alpha_search import search_alpha
from .block_tuning import tune
from .ends import Block
from .hidden_states import HiddenStates
from .observers import SecondMoment

log = logging.getLogger("smoothq")

HESSIAN_BYTES = 1 << 30  # of experts' Hessians in memory at once


def quantize_block(
    block: Block,
    plan: Plan,
    world: World,
    stream: HiddenStates | None,
    unquantized: HiddenStates | None,
    stage: Stage,
) -> None:
    """Transform and quantize one block, and advance the hidden states through it.

    Args:
        block: the block in float; its linears are quantized ones on return.
        plan: the model's plan.
        world: the ranks of the run.
        stream: the hidden states of the quantized model, or None without calibration.
        unquantized: those of the float model, if the recipe tunes blocks, else None.
        stage: called with the name of each stage.
    """
    recipe = plan.recipe
    if stream is not None and not stream.reach(block.index):
        log.warning(
            "%s: the model does not run this block on text; its weights are rounded to nearest",
            block.name,
        )
        stream = unquantized = None
    follows_float = recipe.smoothing is not None and not recipe.sees_quantized
    transform_block(block, plan, stream, follows_float, stage)
    if unquantized is not None:
        stage("float forward")
        unquantized.advance(block.module, block.index)
    inputs = install_inputs(block.module, block.plan, SequenceContext(), block.name)
    for site_input in inputs.values():
        site_input.to(next(block.module.parameters()).device)
    unrounded: dict[str, Tensor] = {}
    for name, together in groupby(block.plan.sites, key=lambda site_plan: site_plan.site.stage):
        stage(f"quantize {name}")
        unrounded |= _quantize_sites(block, recipe, world, list(together), inputs, stream)
    if stream is not None and unquantized is not None and recipe.tuning is not None:
        stage("tune")
        tune(block.module, block.index, block.plan, unrounded, stream, unquantized, recipe.tuning)
    if stream is not None and not follows_float:
        stage("forward")
        stream.advance(block.module, block.index)


def transform_block(
    block: Block,
    plan: Plan,
    stream: HiddenStates | None,
    advance: bool = False,
    stage: Stage | None = None,
) -> None:
    """Smooth a float block and rotate its values as planned, in place; it computes the same.

    Args:
        block: the block in float.
        plan: the model's plan.
        stream: the hidden states that enter the block; None leaves it unsmoothed.
        advance: whether to advance `stream` through the float block, if the recipe smooths.
        stage: called with the name of the stage.
    """
    recipe, graph = plan.recipe, block.plan.graph
    if recipe.smoothing is not None and stream is not None and stream.reach(block.index):
        if stage is not None:
            stage("smooth")
        _smooth(block, plan, stream, advance)
    if graph.value_output is not None and block.plan.value_rotation is not None:
        rotate_value_output(block.module, graph.value_output, block.plan.value_rotation)


def _smooth(block: Block, plan: Plan, stream: HiddenStates, advance: bool) -> None:
    """Smooth the edges that the recipe names. advance: advance `stream` through the float block."""
    smoothing = plan.recipe.smoothing
    assert smoothing is not None
    plans = [site_plan for site_plan in block.plan.sites if site_plan.site.edge in smoothing.edges]
    entering = stream.copy()
    maxima = stream.maxima(
        block.module,
        block.name,
        block.index,
        [site_plan.site for site_plan in plans],
        smoothing.quantile,
        advance,
    )
    for site_plan in plans:
        site = site_plan.site
        alpha = smoothing.alpha_of(site.edge)
        if alpha == "auto":
            alpha = search_alpha(block.module, block.index, site_plan, maxima[site.name], entering)
            log.debug("%s, %s: alpha %g", block.name, site.name, alpha)
        smooth(block.module, site, maxima[site.name], alpha, plan.stored_dtype)


def _quantize_sites(
    block: Block,
    recipe: Recipe,
    world: World,
    plans: list[SitePlan],
    inputs: dict[str, InputQuantizer],
    stream: HiddenStates | None,
) -> dict[str, Tensor]:
    """Calibrate sites of one stage, round their weights, and install the quantized linears.

    In a distributed run each rank rounds a share of the matrices. Returns module name → float
    (N, K), the values that its codes were rounded from; empty unless the recipe tunes blocks.
    """
    unrounded: dict[str, Tensor] = {}
    token_groups: list[_TokenGroup] = []
    for plan in plans:
        site, site_input = plan.site, inputs[plan.site.name]
        if plan.input.rotation is not None:
            for reader in site.readers:
                rotate_input(reader.view(block.module), plan.input.rotation)
        if stream is not None:
            normalise = recipe.runtime_smoothing is not None and recipe.runtime_smoothing.normalise
            stream.calibrate(block.module, block.index, site, site_input, normalise)
        token_groups += [
            _TokenGroup(plan, modules, site_input, _largest(block, plan, modules))
            for modules in site.token_groups
        ]
    for together in _in_memory(token_groups):
        moments: dict[str, SecondMoment] = {}
        if stream is not None and recipe.weights.rounding == "gptq":
            watched = {token_group.modules[0]: token_group.input for token_group in together}
            moments = stream.hessians(block.module, block.index, watched)
        factors = _Factors(block, moments, recipe)
        work = [(token_group, name) for token_group in together for name in token_group.modules]
        for turn in (work[i : i + world.size] for i in range(0, len(work), world.size)):
            work_here = turn[world.rank] if world.rank < len(turn) else None
            local = world.raise_together(partial(_round, block, work_here, factors, recipe))
            for rank, (token_group, name) in enumerate(turn):
                rounded = world.broadcast_from(lambda local=local: local, rank)  # type: ignore[misc]
                assert rounded is not None
                rounded = rounded.to(world.device)
                _install(block, token_group, name, rounded)
                if rounded.unrounded is not None:
                    unrounded[name] = rounded.unrounded
            del local, rounded
    return unrounded


def _install(block: Block, token_group: _TokenGroup, name: str, rounded: QuantizedWeight) -> None:
    """Put a quantized linear in the place of a float one; mapped if that is."""
    linear = block.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    quantized = install_linear(block.module, name, token_group.plan, token_group.input)
    quantized.transient = is_mapped(linear.weight)
    quantized.set_weight(rounded, linear.bias)
    if quantized.transient and block.directory is not None:
        quantized.hold(mapped(quantized.codes, block.directory))


class _Factors:
    """The Hessian factors of token groups, computed on demand; only the last is kept."""

    def __init__(self, block: Block, moments: dict[str, SecondMoment], recipe: Recipe) -> None:
        """moments: the Hessian of each token group by its first module; empty without GPTQ."""
        self._block, self._moments, self._recipe = block, moments, recipe
        self._last: tuple[str, Factor | None] = ("", None)  # first module, factor

    def factor(self, token_group: _TokenGroup) -> Factor | None:
        """The factor of a token group, or None if its matrices are to be rounded to nearest."""
        name = token_group.modules[0]
        if self._last[0] != name:
            self._last = ("", None)
            moment = self._moments.pop(name, None)
            factor = (
                None if moment is None else _factor(self._block, token_group, moment, self._recipe)
            )
            self._last = (name, factor)
        return self._last[1]


@dataclass(frozen=True)
class _TokenGroup:
    """Modules of a site that the same tokens reach: a single expert, or all that is not routed.

    largest: as of `Grid.find_scales`.
    """

    plan: SitePlan
    modules: tuple[str, ...]
    input: InputQuantizer
    largest: float | None

    @property
    def routed(self) -> bool:
        """Whether a router decides which tokens reach the modules."""
        readers = self.plan.site.readers
        return any(reader.routed for reader in readers if reader.module in self.modules)


def _largest(block: Block, plan: SitePlan, modules: tuple[str, ...]) -> float | None:
    """The largest magnitude of the weights that share a tensor's scale; None where none do.

    Servers merge q, k and v, or gate and up, and multiply them by one tensor's scale.
    """
    if not any(plan.modules[name].grid.shares_scale for name in modules):
        return None
    largest = 0.0
    for name in modules:
        weight = block.module.get_submodule(name).get_parameter("weight")
        touch(weight)
        largest = max(largest, float(weight.abs().amax()))
    return largest


def _in_memory(token_groups: list[_TokenGroup]) -> Iterator[list[_TokenGroup]]:
    """Split token groups into runs whose Hessians fit into memory together."""
    run: list[_TokenGroup] = []
    for token_group in token_groups:
        if (
            run
            and 8 * sum(member.input.spec.width**2 for member in [*run, token_group])
            > HESSIAN_BYTES
        ):
            yield run
            run = []
        run.append(token_group)
    yield run


def _factor(
    block: Block, token_group: _TokenGroup, moment: SecondMoment, recipe: Recipe
) -> Factor | None:
    """The factor of a token group's Hessian; None for an expert that too few tokens reached."""
    site = token_group.modules[0] if token_group.routed else token_group.plan.site.name
    where = f"{block.name}, {site}"
    if token_group.routed and moment.tokens < recipe.gptq.least_tokens:
        log.warning(
            "%s: %d tokens of the calibration text reached this expert; rounded to nearest",
            where,
            moment.tokens,
        )
        return None
    return factorise(moment.result(), recipe.gptq, where)


def _round(
    block: Block, work: tuple[_TokenGroup, str] | None, factors: _Factors, recipe: Recipe
) -> QuantizedWeight | None:
    """The rounded weight of one linear of a token group; None where a turn has no work."""
    if work is None:
        return None
    token_group, name = work
    factor = factors.factor(token_group)
    linear = block.module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    grid = token_group.plan.modules[name].grid
    touch(linear.weight)
    if factor is None:
        rounded = round_to_nearest(linear.weight, grid, token_group.largest)
    else:
        rounded = gptq(linear.weight, factor, grid, recipe.gptq.block_size, token_group.largest)
    return rounded if recipe.tuning is not None else replace(rounded, unrounded=None)
