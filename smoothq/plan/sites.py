"""The number formats of every site and linear of a model, block by block."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any, cast

from torch import nn

from ..architectures import BlockGraph, Norm, Site
from ..errors import RecipeError, UnsupportedModelError
from ..modules import InputSpec, WeightSpec
from ..modules.input_quantizer import Mode
from ..recipe.recipe import FLOAT_BITS, Activations, GroupSize, Recipe
from ..rounding.float_grid import FloatGrid, block_group
from ..rounding.grid import Grid, IntegerGrid
from ..transforms.hadamard import Hadamard
from .plan import BlockPlan, SitePlan, TowerLinear
from .wiring import Wiring

AUTO_GROUP_SIZES = (128, 64, 32)


def residual_rotation(wiring: Wiring, recipe: Recipe) -> Hadamard | None:
    """The rotation of the residual stream (R1) that is folded into the blocks, or None."""
    if not _folds_rotation(wiring, recipe):
        return None
    width, centred = wiring.config.hidden_size, wiring.family.centred
    return Hadamard.of(width, recipe.seed, centred, _rotated_together(recipe, width))


def _rotated_together(recipe: Recipe, width: int) -> int | None:
    """The order of a rotation's blocks, None for the largest: what divides the width too."""
    size = recipe.rotates.block_size
    return None if size is None else gcd(size, width)


def plan_blocks(wiring: Wiring, recipe: Recipe) -> tuple[BlockPlan, ...]:
    """The plan of every block.

    Equal blocks share one, except for the rotation of their values.

    Args:
        wiring: of the model.
        recipe: the recipe to resolve.

    Raises:
        RecipeError: a group size does not fit, or an override divides what reads one tensor.
        UnsupportedModelError: a norm's bias cannot be folded.
    """
    plans: list[BlockPlan] = []
    known: list[tuple[object, BlockPlan]] = []
    for index, (layer, graph) in enumerate(zip(wiring.layers, wiring.graphs, strict=True)):
        modules = [module for site in graph.sites for module in site.modules]
        block = wiring.parts.block_name(index)
        named = [f"{block}.{module}" for module in modules] if recipe.names_modules else []
        # Equal layers and graphs are one object and outlive this loop: their ids identify them.
        kind = id(layer), id(graph), [(recipe.keeps(full), recipe.override(full)) for full in named]
        plan = next((plan for other, plan in known if other == kind), None)
        if plan is None:
            plan = _plan_block(wiring, recipe, index)
            known.append((kind, plan))
        plans.append(replace(plan, value_rotation=_value_rotation(graph, recipe, index)))
    return tuple(plans)


def plan_towers(wiring: Wiring, recipe: Recipe) -> dict[str, TowerLinear]:
    """The quantized linears of vision and audio towers, by their full names.

    Raises:
        RecipeError: a group size does not fit, or an override asks for what no tower can have.
    """
    towers = {}
    for name in wiring.towers:
        wanted, stored = recipe.for_tower(name), wiring.tensors.get(f"{name}.weight")
        if wanted is not None and stored is not None:
            rows, columns = stored.shape
            spec = WeightSpec(rows, columns, weight_grid(wanted, columns, name))
            inputs = InputSpec(columns, FLOAT_BITS, "float")
            if wanted.activations.bits != FLOAT_BITS:
                a = wanted.activations
                inputs = InputSpec(columns, a.bits, "token", a.clip_ratio, full_range=a.full_range)
            towers[name] = TowerLinear(spec, inputs, stored.nbytes)
    return towers


def _value_rotation(graph: BlockGraph, recipe: Recipe, index: int) -> Hadamard | None:
    heads = None if graph.turned_values is None else graph.turned_values.heads
    if heads is None or not recipe.rotates.value_output:
        return None
    # Other random signs in every layer: an unlucky draw is then not repeated in all layers.
    block = _rotated_together(recipe, heads.dim)
    return Hadamard.of(heads.dim, recipe.seed * 1000 + index, block=block)


def _plan_block(wiring: Wiring, recipe: Recipe, index: int) -> BlockPlan:
    """A block's plan without the rotation of its values, which differs between equal blocks."""
    layer, stock, name = wiring.layers[index], wiring.graphs[index], wiring.parts.block_name(index)
    graph = stock.keeping(lambda module: recipe.keeps(f"{name}.{module}"))
    weights = {
        module: layer.get_submodule(module).get_parameter("weight")
        for site in stock.sites
        for module in site.modules
    }
    sites = tuple(_plan_site(wiring, recipe, index, site) for site in graph.sites if site.readers)
    quantized = [module for site in sites for module in site.modules]
    floats = dict.fromkeys(
        reader.module
        for site in graph.sites
        if _takes_bias(wiring, recipe, index, site)
        for reader in site.float_readers
    )
    for module in floats:
        if not isinstance(layer.get_submodule(module), nn.Linear):
            raise UnsupportedModelError(
                f"{name}.{module} is no linear that could take in the bias of the norm before it: "
                "leave rotation out of the recipe"
            )
    fed = [module for site in sites if site.adds_bias for module in site.modules]
    new_biases = tuple(module for module in floats if layer.get_submodule(module).bias is None)
    unread = [
        old.modules[0]
        for old, new in zip(stock.sites, graph.sites, strict=True)
        if old.readers and not new.readers
    ]
    return BlockPlan(
        graph,
        sites,
        value_rotation=None,
        unquantized_bytes=sum(weights[module].nbytes for module in quantized),
        kept_elements=sum(w.numel() for m, w in weights.items() if m not in quantized),
        kept_width=sum(weights[module].shape[1] for module in unread),
        new_biases=new_biases,
        bias_elements=sum(
            layer.get_submodule(module).get_parameter("weight").shape[0]
            for module in (*fed, *new_biases)
            if layer.get_submodule(module).bias is None
        ),
    )


def _folds_rotation(wiring: Wiring, recipe: Recipe) -> bool:
    """Whether a rotation of the residual stream is folded into the blocks, and so their norms."""
    return recipe.rotates.residual is True and wiring.rotatable


def _takes_bias(wiring: Wiring, recipe: Recipe, index: int, site: Site) -> bool:
    """Whether the bias of the norm before a site is folded into its linears."""
    norm = site.producer
    if not isinstance(norm, Norm) or not _folds_rotation(wiring, recipe):
        return False
    return norm.bias_view(wiring.layers[index]) is not None


def _plan_site(wiring: Wiring, recipe: Recipe, index: int, site: Site) -> SitePlan:
    block, modules, inputs = wiring.parts.block_name(index), {}, {}
    for name in site.modules:
        linear, where = wiring.layers[index].get_submodule(name), f"{block}.{name}"
        assert isinstance(linear, nn.Linear)
        width, linear_recipe = linear.in_features, recipe.for_module(where)
        grid = weight_grid(linear_recipe, width, where)
        modules[name] = WeightSpec(linear.out_features, width, grid)
        inputs[name] = _input_spec(wiring, linear_recipe, site, width, where)
    first, *others = inputs
    for other in others:
        if inputs[other] != inputs[first]:
            raise RecipeError(
                f"{block}: {first} and {other} read the same tensor, so an override must give "
                "both the same activations"
            )
    adds_bias, parent = _takes_bias(wiring, recipe, index, site), _parent(wiring, index, first)
    return SitePlan(site, inputs[first], modules, adds_bias, parent)


def _parent(wiring: Wiring, index: int, module: str) -> str:
    """The innermost module around a linear that does not run through all of its children.

    In an nn.Sequential an InputQuantizer would become a step, in an nn.ModuleList an entry.
    """
    parent = module.rpartition(".")[0]
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    while parent and isinstance(wiring.layers[index].get_submodule(parent), containers):
        parent = parent.rpartition(".")[0]
    return parent


def weight_grid(recipe: Recipe, columns: int, where: str) -> Grid:
    """The grid of a linear's weight.

    Args:
        recipe: of the linear.
        columns: of its weight.
        where: its full name, for messages.

    Raises:
        RecipeError: for a group size that does not fit.
    """
    weights = recipe.weights
    size = columns
    if weights.granularity == "group":
        size = _group_size(weights.group_size, columns, where)
    if weights.type == "float":
        if weights.granularity == "block":
            size = block_group(columns)
        assert weights.group_scale != "multiplier"
        element = "e4m3" if weights.bits == 8 else "e2m1"
        kind = (weights.bits, weights.granularity, size, element)
        return FloatGrid(*kind, weights.group_scale, weights.clip)
    assert weights.granularity != "block"
    return IntegerGrid(
        weights.bits,
        weights.granularity,
        size,
        weights.group_scale == "multiplier",
        weights.clip,
        weights.full_range,
        weights.symmetric,
    )


def _group_size(size: GroupSize, columns: int, where: str) -> int:
    """The channels of a group; an input with fewer than a group of them is one group."""
    if size == "auto":
        if columns < min(AUTO_GROUP_SIZES):
            return columns
        fitting = next((auto for auto in AUTO_GROUP_SIZES if columns % auto == 0), None)
        if fitting is None:
            raise RecipeError(
                f"{where}: none of the group sizes {AUTO_GROUP_SIZES} divides {columns} "
                "input channels; set weights.group_size, or use per-channel scales"
            )
        return fitting
    if columns < size:
        return columns
    if size < 1 or columns % size:
        raise RecipeError(
            f"{where}: group size {size} does not divide {columns} input channels; "
            "set another group size, or 'auto'"
        )
    return size


def _rotates_online(wiring: Wiring, recipe: Recipe, site: Site) -> bool:
    """Whether a site's input is rotated online because no offline rotation reaches it."""
    match site.reads:
        case "residual":
            return recipe.rotates.residual == "online" or (
                recipe.rotates.residual and not wiring.rotatable
            )
        case "attention":
            return recipe.rotates.value_output and not site.turns_values
        case "mlp":
            return recipe.rotates.down


def _float_mode(activations: Activations) -> tuple[Mode, int]:
    """The mode of floating-point activations, and the channels of a group."""
    if activations.granularity == "group":
        scale = activations.group_scale
        mode = "group" if scale == "float" else scale
        return cast(Mode, f"fp_{mode}"), activations.group_size
    kind = "static" if activations.static else activations.granularity
    return cast(Mode, f"fp_{kind}"), 1


def plain_input(recipe: Recipe, width: int) -> InputSpec:
    """How an input is quantized that nothing is done to before; runtime smoothing is left out.

    Args:
        recipe: of the linears that read it.
        width: channels of the input.
    """
    activations = recipe.activations
    settings: dict[str, Any] = {}
    mode: Mode
    if activations.bits == FLOAT_BITS:
        mode = "float"
    elif activations.is_float:
        mode, settings["group_size"] = _float_mode(activations)
    elif activations.granularity == "tensor":
        mode = "static" if activations.static else "tensor"
    else:
        mode = "token"
        settings["full_range"] = activations.full_range
    return InputSpec(width, activations.bits, mode, activations.clip_ratio, **settings)


def _input_spec(wiring: Wiring, recipe: Recipe, site: Site, width: int, where: str) -> InputSpec:
    spec, smooth = plain_input(recipe, width), recipe.runtime_smoothing
    settings: dict[str, Any] = {}
    if smooth is not None:
        settings["mode"] = cast(Mode, f"smooth_{smooth.scope}")
        if smooth.scope != "calibrated":
            settings["group_size"] = _group_size(smooth.group_size, width, where)
        settings["normalise"] = smooth.normalise
    if _rotates_online(wiring, recipe, site):
        block = _rotated_together(recipe, width)
        settings["rotation"] = Hadamard.of(width, recipe.seed, block=block)
    return replace(spec, **settings)
