"""Resolve a recipe for one model into a `Plan`: number formats of every site, and the sizes.

A plan needs only the model's config and shapes, no weights; models and recipes that cannot be
quantized are refused here. Loading a quantized checkpoint computes the same plan again from the
recipe in its config, so the plan itself is never stored.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import (
    BlockGraph,
    Family,
    Heads,
    Norm,
    Parts,
    Rows,
    Site,
    family_of,
)
from ..architectures.graph import (
    is_tied,
    takes_rotation,
    text_config,
)
from ..architectures.linearize import linearize_block
from ..compat import tied_weights
from ..discovery.infer import discover_family
from ..discovery.weight_reads import weights_read
from ..errors import RecipeError, UnsupportedModelError
from ..modules import (
    InputSpec,
    WeightSpec,
)
from ..modules.input_quantizer import Mode
from ..recipe.recipe import FLOAT_BITS, GroupSize, Recipe
from ..rounding.grid import IntegerGrid
from ..transforms.hadamard import Hadamard
from .attention import cached_bits, plan_attention
from .plan import Bits, BlockPlan, Plan, SitePlan, site_rotations, weight_specs

log = logging.getLogger("smoothq")

AUTO_GROUP_SIZES = (128, 64, 32)
PREFILL_TOKENS = 2048  # length of the sequence among whose tokens shared scales are divided


def make_plan(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Resolve a recipe for a model.

    Args:
        model: the float model; it may be on the meta device, as only shapes are read.
        recipe: the recipe to resolve.

    Raises:
        UnsupportedModelError: the model cannot be quantized.
        RecipeError: the recipe does not fit the model.
    """
    config = text_config(model)
    family = family_of(config) or _inferred(model)
    parts = family.parts(model)
    smooth = recipe.runtime_smoothing
    if family.flattens and smooth is not None and smooth.scope == "live":
        raise RecipeError(
            f"{config.model_type}: live runtime smoothing needs whole sequences, and its blocks "
            "join the tokens of all sequences before some linears; use --smooth-scope token"
        )
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    opened = _opened(layers)
    graphs = _graphs(family, config, opened)
    recipe, read = _keeping_what_is_read(model, recipe, graphs, parts)
    rotatable = takes_rotation(graphs)
    blocks = _plan_blocks(opened, graphs, recipe, parts.layers, rotatable)
    if not weight_specs(blocks):
        raise RecipeError("keep leaves no linear to quantize; give fewer patterns")
    _check_patterns(recipe, graphs, parts)
    tables = _tables(model, parts, recipe)
    dtype, added = _stored_dtype(recipe, model), _added_biases(opened, blocks)
    rotation = None
    if rotatable and recipe.rotation is not None and recipe.rotation.residual:
        rotation = Hadamard.of(config.hidden_size, recipe.seed, family.centred)
    attention = plan_attention(model, graphs, recipe)
    keys = None if attention is None else attention.rotation
    fallbacks = [r.fallback for r in [rotation, keys, *site_rotations(blocks)] if r is not None]
    notes = [note for note in fallbacks if note] + _auto_group_notes(recipe, blocks)
    notes += _wiring_notes(recipe, blocks, rotatable) + read
    return Plan(
        recipe=recipe,
        family=family,
        parts=parts,
        blocks=blocks,
        residual_rotation=rotation,
        attention=attention,
        bits=_count_bits(blocks, dtype, cached_bits(attention, graphs)),
        notes=tuple(dict.fromkeys(notes)),
        stored_dtype=dtype,
        float_elements=stored_elements(model)
        + added
        - _quantized_elements(blocks)
        - sum(rows * columns for rows, columns in tables),
        float_bytes=_float_bytes(model, parts, recipe, blocks, bool(tables))
        + added * dtype.itemsize,
        tables=tables,
    )


def _keeping_what_is_read(
    model: PreTrainedModel, recipe: Recipe, graphs: list[BlockGraph], parts: Parts
) -> tuple[Recipe, list[str]]:
    """The recipe that also keeps in float the linears whose weights the model's code reads.

    The recipe of a quantized checkpoint already lists these linears, so its model is not traced
    again. Returns the recipe, and a note for the user if it was changed.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return recipe, []
    is_read = weights_read(model, parts)
    names = [name for name in _linears(graphs, parts) if is_read(name) and not recipe.keeps(name)]
    if recipe.embeddings == FLOAT_BITS:
        names = [name for name in names if name not in (parts.head, parts.embedding)]
    if not names:
        return recipe, []
    note = (
        f"{len(names)} linears stay in float, as the model's code reads their weights: {names[0]}"
    )
    return recipe.edit(keep=(*recipe.keep, *names)), [note + (", …" if len(names) > 1 else "")]


def _linears(graphs: list[BlockGraph], parts: Parts) -> list[str]:
    """The full names of all linears that a recipe may quantize, and of head and embedding."""
    names = [
        f"{parts.layers}.{index}.{module}"
        for index, graph in enumerate(graphs)
        for site in graph.sites
        for module in site.modules
    ]
    return [*names, parts.head, parts.embedding]


def _check_patterns(recipe: Recipe, graphs: list[BlockGraph], parts: Parts) -> None:
    """Refuse patterns that match nothing: a typing error in `keep` would quantize the linear."""
    names = _linears(graphs, parts)
    for pattern in (*recipe.keep, *(override.match for override in recipe.overrides)):
        if not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"the pattern '{pattern}' matches no linear of the model; they are called like "
                f"'{names[0]}'"
            )


def _tables(model: PreTrainedModel, parts: Parts, recipe: Recipe) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of embedding and untied head; empty if the recipe keeps them in float."""
    names = [parts.embedding, *([] if is_tied(model) else [parts.head])]
    if recipe.embeddings == FLOAT_BITS or any(map(recipe.keeps, (parts.embedding, parts.head))):
        return ()
    embedding = model.get_submodule(parts.embedding)
    if type(embedding) is not nn.Embedding:
        raise RecipeError(
            f"{parts.embedding} is a {type(embedding).__name__}, which does more than look rows "
            "up: it cannot be stored in 8 bits; leave embeddings at 16"
        )
    weights = (model.get_submodule(name).get_parameter("weight") for name in names)
    return tuple((weight.shape[0], weight.shape[1]) for weight in weights)


def _inferred(model: PreTrainedModel) -> Family:
    """The discovered family of a model without an architecture file; logs a warning."""
    family, _ = discover_family(model.config)
    log.warning(
        "architecture '%s' has no file: its wiring was found by experiments on a tiny model and "
        "proven there; smoothq families --infer shows it",
        text_config(model).model_type,
    )
    return family


def _graphs(family: Family, config: PretrainedConfig, opened: list[nn.Module]) -> list[BlockGraph]:
    """The wiring of every block; equal blocks share one object.

    Sharing saves time and memory: the graph of a block with many experts is large.
    """
    known: list[tuple[nn.Module, BlockGraph, BlockGraph]] = []
    graphs = []
    for index, block in enumerate(opened):
        stock = family.block(config, index)
        same = (graph for form, other, graph in known if form is block and other == stock)
        graph = next(same, None)
        if graph is None:
            graph = family.graph(config, index, block)
            known.append((block, stock, graph))
        graphs.append(graph)
    return graphs


def _opened(layers: nn.ModuleList) -> list[nn.Module]:
    """Every block, linearized, on the meta device; blocks of equal modules and shapes share one."""
    forms: dict[tuple[object, ...], nn.Module] = {}

    def opened(layer: nn.Module) -> nn.Module:
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        shapes = tuple(
            (name, tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()
        )
        if (modules, shapes) not in forms:
            form = copy.deepcopy(layer).to("meta")
            linearize_block(form)
            forms[modules, shapes] = form
        return forms[modules, shapes]

    return [opened(layer) for layer in layers]


def _added_biases(opened: list[nn.Module], blocks: tuple[BlockPlan, ...]) -> int:
    """Total elements of the biases that quantization adds to linears without one."""
    return sum(
        spec.out_features
        for layer, block in zip(opened, blocks, strict=True)
        for site in block.sites
        for module, spec in site.modules.items()
        if site.adds_bias and layer.get_submodule(module).bias is None
    ) + sum(
        layer.get_submodule(module).get_parameter("weight").shape[0]
        for layer, block in zip(opened, blocks, strict=True)
        for module in block.new_biases
    )


def stored_elements(model: PreTrainedModel) -> int:
    """Total elements of a float model's checkpoint."""
    return sum(tensor.numel() for tensor in stored_tensors(model).values())


def float_bytes(model: PreTrainedModel) -> int:
    """Bytes of a float model's checkpoint, each tensor in its current dtype."""
    return sum(tensor.nbytes for tensor in stored_tensors(model).values())


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by full name; tied tensors appear once."""
    tied = tied_weights(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _float_bytes(
    model: PreTrainedModel,
    parts: Parts,
    recipe: Recipe,
    blocks: tuple[BlockPlan, ...],
    tables: bool,
) -> int:
    """Bytes of the tensors that stay float. tables: whether embedding and head are in 8 bits."""
    coded = {f"{name}.weight" for name in (parts.embedding, parts.head) if tables}
    kept = [tensor for name, tensor in stored_tensors(model).items() if name not in coded]
    if recipe.dtype == "auto":
        nbytes = sum(tensor.nbytes for tensor in kept)
        return nbytes - sum(block.unquantized_bytes for block in blocks)
    elements = sum(tensor.numel() for tensor in kept) - _quantized_elements(blocks)
    return elements * _stored_dtype(recipe, model).itemsize


def _stored_dtype(recipe: Recipe, model: PreTrainedModel) -> torch.dtype:
    """The recipe's dtype; for "auto" the dtype of most of the model's float parameters."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)  # type: ignore[no-any-return]
    elements: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    return elements.most_common(1)[0][0]


def _auto_group_notes(recipe: Recipe, blocks: tuple[BlockPlan, ...]) -> list[str]:
    sites = [site for block in blocks for site in block.sites]
    chosen = []
    if recipe.weights.granularity == "group" and recipe.weights.group_size == "auto":
        specs = weight_specs(blocks)
        chosen += [("weight", spec.grid.group_size, spec.in_features) for spec in specs]
    smooth = recipe.runtime_smoothing
    if smooth is not None and smooth.group_size == "auto" and smooth.scope != "calibrated":
        chosen += [("activation", s.input.group_size, s.input.width) for s in sites]
    return [
        f"{kind} groups chosen by 'auto': {size} of {width} channels"
        for kind, size, width in chosen
    ]


def _wiring_notes(recipe: Recipe, blocks: tuple[BlockPlan, ...], rotatable: bool) -> list[str]:
    notes = []
    if recipe.rotation is not None and recipe.rotation.residual and not rotatable:
        notes.append(
            "norms stand between the blocks' outputs and the residual stream: it cannot be "
            "rotated offline, so each of its readers' inputs is rotated while the model runs"
        )
    sites = [site.site for block in blocks for site in block.sites]
    edges = {site.edge for site in sites}
    notes += [
        f"no divisor passes the {edge} edge of this family: it is not smoothed there"
        for edge in (recipe.smoothing.edges if recipe.smoothing is not None else ())
        if edge not in edges
    ]
    shared = any(len(site.token_groups) > 1 for site in sites if site.edge == "norms")
    if recipe.smoothing is not None and "norms" in recipe.smoothing.edges and shared:
        notes.append(
            "all experts of a layer share the smoothing divisor of the norm before them; inside, "
            "each has its own, from the tokens that reach it"
        )
    return notes


def _plan_blocks(
    opened: list[nn.Module], graphs: list[BlockGraph], recipe: Recipe, name: str, rotatable: bool
) -> tuple[BlockPlan, ...]:
    """The plan of every block; equal blocks share one, except for the rotation of their values."""
    plans: list[BlockPlan] = []
    known: list[tuple[object, BlockPlan]] = []
    for index, (block, graph) in enumerate(zip(opened, graphs, strict=True)):
        where = f"{name}.{index}"
        modules = [module for site in graph.sites for module in site.modules]
        named = [f"{where}.{module}" for module in modules] if recipe.names_modules else []
        # Equal blocks and graphs are one object and outlive this loop: their ids identify them.
        kind = id(block), id(graph), [(recipe.keeps(full), recipe.override(full)) for full in named]
        plan = next((plan for other, plan in known if other == kind), None)
        if plan is None:
            plan = _plan_block(block, graph, recipe, where, rotatable)
            known.append((kind, plan))
        plans.append(replace(plan, value_rotation=_value_rotation(plan.graph, recipe, index)))
    return tuple(plans)


def _value_rotation(graph: BlockGraph, recipe: Recipe, index: int) -> Hadamard | None:
    if recipe.rotation is None or not recipe.rotation.value_output or not graph.value_output:
        return None
    heads = _value_heads(graph.value_output)
    # Other random signs in every layer: an unlucky draw is then not repeated in all layers.
    return Hadamard.of(heads.dim, recipe.seed * 1000 + index)


def _plan_block(
    layer: nn.Module,
    stock: BlockGraph,
    recipe: Recipe,
    name: str,
    rotatable: bool,
) -> BlockPlan:
    """A block's plan without the rotation of its values, which differs between equal blocks."""
    graph = stock.keeping(lambda module: recipe.keeps(f"{name}.{module}"))
    planned = [site for site in graph.sites if site.readers]
    sites = tuple(_plan_site(layer, site, recipe, name, rotatable) for site in planned)
    pairs = zip(stock.sites, graph.sites, strict=True)
    kept = {
        module: site for old, site in pairs for module in old.modules if module not in site.modules
    }
    weights = {module: layer.get_submodule(module).get_parameter("weight") for module in kept}
    widths = {site.name: weights[m].shape[1] for m, site in kept.items() if not site.readers}
    floats = dict.fromkeys(
        reader.module
        for site in graph.sites
        if _takes_bias(layer, site, recipe, rotatable)
        for reader in site.float_readers
    )
    for module in floats:
        if not isinstance(layer.get_submodule(module), nn.Linear):
            raise UnsupportedModelError(
                f"{name}.{module} is no linear that could take in the bias of the norm before it: "
                "leave rotation out of the recipe"
            )
    new_biases = tuple(m for m in floats if layer.get_submodule(m).bias is None)
    return BlockPlan(
        graph,
        sites,
        value_rotation=None,
        unquantized_bytes=sum(
            layer.get_submodule(module).get_parameter("weight").nbytes
            for site in sites
            for module in site.modules
        ),
        kept_elements=sum(weight.numel() for weight in weights.values()),
        kept_width=sum(widths.values()),
        new_biases=new_biases,
    )


def _value_heads(site: Site) -> Heads:
    producer = site.producer
    assert isinstance(producer, Rows)
    assert producer.heads is not None
    return producer.heads


def _takes_bias(layer: nn.Module, site: Site, recipe: Recipe, rotatable: bool) -> bool:
    """Whether the bias of the norm before a site is folded into its linears."""
    fused = rotatable and recipe.rotation is not None and recipe.rotation.residual
    producer = site.producer
    return fused and isinstance(producer, Norm) and producer.bias_view(layer) is not None


def _plan_site(
    layer: nn.Module, site: Site, recipe: Recipe, block: str, rotatable: bool
) -> SitePlan:
    modules, inputs = {}, {}
    for name in site.modules:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        where = f"{block}.{name}"
        width, linear_recipe = linear.in_features, recipe.for_module(where)
        grid = _weight_grid(linear_recipe, width, where)
        modules[name] = WeightSpec(linear.out_features, width, grid)
        inputs[name] = _input_spec(site, linear_recipe, width, where, rotatable)
    first, *others = inputs
    for other in others:
        if inputs[other] != inputs[first]:
            raise RecipeError(
                f"{block}: {first} and {other} read the same tensor, so an override must give "
                "both the same activations"
            )
    adds_bias = _takes_bias(layer, site, recipe, rotatable)
    return SitePlan(site, inputs[first], modules, adds_bias)


def _weight_grid(recipe: Recipe, columns: int, where: str) -> IntegerGrid:
    weights = recipe.weights
    size = columns
    if weights.granularity == "group":
        size = _group_size(weights.group_size, columns, where)
    multiplier = weights.group_scale == "multiplier"
    return IntegerGrid(
        weights.bits,
        weights.granularity,
        size,
        multiplier,
        weights.clip,
        weights.full_range,
        weights.symmetric,
    )


def _group_size(size: GroupSize, columns: int, where: str) -> int:
    if size == "auto":
        fitting = next((auto for auto in AUTO_GROUP_SIZES if columns % auto == 0), None)
        if fitting is None:
            raise RecipeError(
                f"{where}: none of the group sizes {AUTO_GROUP_SIZES} divides {columns} "
                "input channels; set --group-size, or use per-channel scales"
            )
        return fitting
    if size < 1 or columns % size:
        raise RecipeError(
            f"{where}: group size {size} does not divide {columns} input channels; "
            "set another group size, or 'auto'"
        )
    return size


def _rotates_online(site: Site, recipe: Recipe, rotatable: bool) -> bool:
    """Whether a site's input is rotated online because no offline rotation reaches it."""
    rotation = recipe.rotation
    if rotation is None:
        return False
    match site.reads:
        case "residual":
            return rotation.residual and not rotatable
        case "attention":
            return rotation.value_output and site.edge != "value_output"
        case "mlp":
            return rotation.down


def _input_spec(site: Site, recipe: Recipe, width: int, where: str, rotatable: bool) -> InputSpec:
    activations, smooth = recipe.activations, recipe.runtime_smoothing
    settings: dict[str, Any] = {}
    mode: Mode
    if activations.bits == FLOAT_BITS:
        mode = "float"
    elif smooth is not None:
        mode = cast(Mode, f"smooth_{smooth.scope}")
        if smooth.scope != "calibrated":
            settings["group_size"] = _group_size(smooth.group_size, width, where)
        settings["normalise"] = smooth.normalise
    elif activations.granularity == "tensor":
        mode = "static" if activations.static else "tensor"
    else:
        mode = "token"
        settings["full_range"] = activations.full_range
    if _rotates_online(site, recipe, rotatable):
        settings["rotation"] = Hadamard.of(width, recipe.seed)
    return InputSpec(width, activations.bits, mode, activations.clip_ratio, **settings)


def _quantized_elements(blocks: tuple[BlockPlan, ...]) -> int:
    return sum(spec.elements for spec in weight_specs(blocks))


def _count_bits(blocks: tuple[BlockPlan, ...], dtype: torch.dtype, cached: float) -> Bits:
    sites = [site for block in blocks for site in block.sites]
    kept = sum(block.kept_elements for block in blocks)
    kept_width = sum(block.kept_width for block in blocks)
    stored = sum(spec.stored_bits for spec in weight_specs(blocks)) + 8 * dtype.itemsize * kept
    elements = _quantized_elements(blocks) + kept
    inputs = [site.input for site in sites]
    width = sum(spec.width for spec in inputs) + kept_width

    def activation(tokens: int) -> float:
        bits = sum(spec.bits * spec.width + spec.scale_bits(tokens) for spec in inputs)
        return (bits + FLOAT_BITS * kept_width) / width

    return Bits(stored / elements, activation(PREFILL_TOKENS), activation(1), cached)
