"""Messages for the user on what a recipe comes to for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..architectures.experts import closed_stacks
from .plan import Plan


def notes_on(plan: Plan, read: Sequence[str], sensitive: Mapping[str, str]) -> tuple[str, ...]:
    """What the user should know of a plan, one line each.

    Args:
        plan: the plan.
        read: the linears that stay in float as the model's code reads their weights.
        sensitive: patterns of those that stay in float unless an override names them → what these
            linears do.
    """
    notes = [*plan.wiring.family.notes, *_fallbacks(plan), *_chosen_groups(plan), *_limits(plan)]
    notes += [
        f"{pattern} stays in float, for it {does}; an override of that pattern quantizes it"
        for pattern, does in sensitive.items()
    ]
    if plan.towers:
        first, *others = plan.towers
        bits = sorted({linear.weight.grid.bits for linear in plan.towers.values()})
        notes.append(
            f"{len(plan.towers)} of {len(plan.wiring.towers)} linears of the towers are rounded to "
            f"nearest, in {' and '.join(map(str, bits))} bits: {first}{', …' if others else ''}"
        )
    if read:
        notes.append(
            f"{len(read)} linears stay in float, as the model's code reads their weights: "
            f"{read[0]}{', …' if len(read) > 1 else ''}"
        )
    closed = _closed_stacks(plan)
    if closed:
        notes.append(
            f"{len(closed)} stacks of matrices, as experts have them, stay in float, for no form "
            f"that is known has them: {closed[0]}{', …' if len(closed) > 1 else ''}"
        )
    return tuple(dict.fromkeys(notes))


def _closed_stacks(plan: Plan) -> list[str]:
    """The full names of the stacks of matrices in all blocks for which no linear stands."""
    stacks: dict[nn.Module, list[str]] = {}  # equal blocks are one object
    for layer in plan.wiring.layers:
        if layer not in stacks:
            stacks[layer] = list(closed_stacks(layer))
    return [
        f"{plan.parts.block_name(index)}.{name}"
        for index, layer in enumerate(plan.wiring.layers)
        for name in stacks[layer]
    ]


def _fallbacks(plan: Plan) -> Iterator[str]:
    """Yield where no Hadamard matrix of the width is known, or the recipe's blocks do not fit."""
    keys = None if plan.attention is None else plan.attention.rotation
    online = [site.input.rotation for site in plan.sites]
    values = [block.value_rotation for block in plan.blocks]
    size = plan.recipe.rotates.block_size
    for rotation in (plan.residual_rotation, *values, *online):
        if size is not None and rotation is not None and rotation.order % size:
            yield (
                f"blocks of {size} do not divide {rotation.order} channels: they are rotated in "
                f"blocks of {rotation.left * rotation.right}"
            )
    for rotation in (plan.residual_rotation, keys, *online):
        if rotation is not None and rotation.fallback is not None:
            yield rotation.fallback


def _chosen_groups(plan: Plan) -> Iterator[str]:
    """Yield the group sizes that the recipe's `auto` came to."""
    weights, smooth = plan.recipe.weights, plan.recipe.runtime_smoothing
    chosen = []
    if weights.granularity == "group" and weights.group_size == "auto":
        specs = (spec for _, spec, _ in plan.linears())
        chosen += [("weight", spec.grid.group_size, spec.in_features) for spec in specs]
    if smooth is not None and smooth.group_size == "auto" and smooth.scope != "calibrated":
        inputs = (site.input for site in plan.sites)
        chosen += [("activation", spec.group_size, spec.width) for spec in inputs]
    for kind, size, width in chosen:
        yield f"{kind} groups chosen by 'auto': {size} of {width} channels"
    yield from _narrow(plan)


def _narrow(plan: Plan) -> Iterator[str]:
    """Yield how many linears have fewer input channels than the recipe's groups."""
    weights = plan.recipe.weights
    if weights.granularity == "group" and weights.group_size != "auto":
        asked = weights.group_size
        narrow = [name for name, spec, _ in plan.linears() if spec.in_features < asked]
        if narrow:
            yield (
                f"{len(narrow)} linears have fewer input channels than a group of {asked}, and "
                f"one scale a row: {narrow[0]}{', …' if len(narrow) > 1 else ''}"
            )


def _limits(plan: Plan) -> Iterator[str]:
    """Yield what the recipe asks for and the model's wiring does not allow, or only in part."""
    if plan.recipe.rotates.residual is True and not plan.wiring.rotatable:
        yield (
            "norms stand between the blocks' outputs and the residual stream: it cannot be "
            "rotated offline, so each of its readers' inputs is rotated while the model runs"
        )
    if plan.recipe.smoothing is None:
        return
    sites = [site.site for site in plan.sites]
    edges = {site.edge for site in sites}
    for edge in plan.recipe.smoothing.edges:
        if edge not in edges:
            yield f"no divisor passes the {edge} edge of this family: it is not smoothed there"
    shared = any(len(site.token_groups) > 1 for site in sites if site.edge == "norms")
    if "norms" in plan.recipe.smoothing.edges and shared:
        yield (
            "all experts of a layer share the smoothing divisor of the norm before them; inside, "
            "each has its own, from the tokens that reach it"
        )
