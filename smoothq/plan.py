"""What a recipe comes to for one model: what each site gets, and the bits counted.

A plan is made from the model's config and shapes alone, before any weight is read; what cannot be
done is refused here. Loading a quantized checkpoint makes the same plan again from the recipe in
its config, so nothing of it needs to be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import BlockGraph, Family, Heads, Rows, Site, family_of
from .architectures.attention import unquantizable_attention
from .architectures.graph import attention_heads
from .errors import DeviceError, RecipeError, UnsupportedModelError
from .kernels import runs_on
from .modules import (
    AttentionSpec,
    CacheFormat,
    InputQuantizer,
    InputSpec,
    QuantizedLinear,
    SequenceContext,
    WeightSpec,
    quantize_attention,
    rotate_ends,
)
from .modules.input_quantizer import Mode
from .recipe import FLOAT_BITS, GroupSize, KvCache, Recipe
from .rounding.grid import IntegerGrid
from .transforms.hadamard import Hadamard

AUTO_GROUP_SIZES = (128, 64, 32)
AUTO_HEAD_GROUPS = (32, 16, 8)  # of a 4-bit KV cache
PREFILL_TOKENS = 2048  # the sequence over which scales shared by a sequence are spread


@dataclass(frozen=True)
class SitePlan:
    """One site of one block: how its input is quantized, and the form of each linear's weight.

    modules: module name within the block → the form of its weight.
    """

    site: Site
    input: InputSpec
    modules: dict[str, WeightSpec]

    @property
    def input_name(self) -> str:
        """The name of the site's InputQuantizer within the block: beside its first reader."""
        parent = next(iter(self.modules)).rpartition(".")[0]
        return f"{parent}.{self.site.name}_input" if parent else f"{self.site.name}_input"


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block: its wiring, its sites, and the rotation of its values (or None)."""

    graph: BlockGraph
    sites: tuple[SitePlan, ...]
    value_rotation: Hadamard | None

    @property
    def attention(self) -> str:
        """The name of the attention module: the one that holds the reader of its values."""
        assert self.graph.value_output is not None
        return self.graph.value_output.modules[0].rpartition(".")[0]


@dataclass(frozen=True)
class Bits:
    """Bits an element with every scale, zero and multiplier counted, averaged over all linears.

    cached: of a key or value in the KV cache, without the tokens that stay in float.
    """

    weight: float
    activation: float
    activation_decode: float
    cached: float = FLOAT_BITS


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for one model.

    residual_rotation: R1, or None. folds_ends: R1 is folded into embedding and head (they are
    not tied), where otherwise it runs online at both ends. attention: of every block, or None where
    it stays float. notes: what the user should know.
    stored_dtype: of everything that stays float; float_elements: how many numbers that is.
    """

    recipe: Recipe
    family: Family
    blocks: tuple[BlockPlan, ...]
    residual_rotation: Hadamard | None
    folds_ends: bool
    attention: AttentionSpec | None
    bits: Bits
    notes: tuple[str, ...]
    stored_dtype: torch.dtype
    float_elements: int

    @property
    def online_rotations(self) -> list[Hadamard]:
        """Every rotation that runs with the model, each once."""
        found = _site_rotations(self.blocks)
        if not self.folds_ends:
            found.append(self.residual_rotation)
        if self.attention is not None:
            found.append(self.attention.rotation)
        return list(dict.fromkeys(rotation for rotation in found if rotation is not None))

    @property
    def linear_bytes(self) -> int:
        """Bytes of all quantized weights with their scales."""
        return sum(spec.stored_bits for spec in _weight_specs(self.blocks)) // 8

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return self.linear_bytes + self.float_elements * self.stored_dtype.itemsize


def make_plan(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Resolve a recipe for a model, which may be on the meta device: only shapes are looked at.

    Raises UnsupportedModelError for a model that cannot be quantized, RecipeError for a recipe
    that does not fit it.
    """
    config = text_config(model)
    family = family_of(config)
    if family.unquantizable:
        raise UnsupportedModelError(f"{config.model_type}: {family.unquantizable}")
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    blocks = tuple(
        _plan_block(layer, family.block(config, index), recipe, index)
        for index, layer in enumerate(layers)
    )
    rotation = None
    if recipe.rotation is not None and recipe.rotation.residual:
        rotation = Hadamard.of(config.hidden_size, recipe.seed)
    attention = _plan_attention(model, blocks, recipe)
    keys = None if attention is None else attention.rotation
    fallbacks = [r.fallback for r in [rotation, keys, *_site_rotations(blocks)] if r is not None]
    notes = [note for note in fallbacks if note] + _auto_group_notes(recipe, blocks)
    return Plan(
        recipe=recipe,
        family=family,
        blocks=blocks,
        residual_rotation=rotation,
        folds_ends=rotation is not None and not config.tie_word_embeddings,
        attention=attention,
        bits=_count_bits(blocks, _cached_bits(attention, config)),
        notes=tuple(dict.fromkeys(notes)),
        stored_dtype=_stored_dtype(recipe, config),
        float_elements=_stored_elements(model, family) - _quantized_elements(blocks),
    )


def _plan_attention(
    model: PreTrainedModel, blocks: tuple[BlockPlan, ...], recipe: Recipe
) -> AttentionSpec | None:
    """The settings of a model's attention, or None where the recipe leaves it float."""
    if not recipe.quantizes_attention:
        return None
    config = text_config(model)
    reason = unquantizable_attention(model)
    if reason is None and any(block.graph.value_output is None for block in blocks):
        reason = "its values do not reach the output projection unchanged"
    if reason is not None:
        raise UnsupportedModelError(
            f"{config.model_type}: attention cannot be quantized: {reason}; leave kv_cache and "
            "attention out of the recipe"
        )
    if recipe.kv_cache is None:
        return AttentionSpec(product=recipe.attention)
    width, wanted = attention_heads(config).dim, recipe.kv_cache
    rotated = wanted.bits == 4 if wanted.rotate_keys == "auto" else wanted.rotate_keys
    cache = CacheFormat(wanted.bits, _head_group(recipe, wanted, width), wanted.float_tokens)
    rotation = Hadamard.of(width, recipe.seed) if rotated else None
    return AttentionSpec(cache, recipe.attention, rotation)


def _cached_bits(attention: AttentionSpec | None, config: PretrainedConfig) -> float:
    if attention is None or attention.cache is None:
        return FLOAT_BITS
    return attention.cache.stored_bits(attention_heads(config).dim)


def _head_group(recipe: Recipe, wanted: KvCache, width: int) -> int | None:
    """Numbers of a head that share a scale in its cache, or None for all of them."""
    size = wanted.group_size
    if size == "auto" and wanted.bits == 4 and recipe.attention == "float":
        size = next((auto for auto in AUTO_HEAD_GROUPS if width % auto == 0), "head")
    if size in ("auto", "head"):
        size = width
    assert isinstance(size, int)
    if size < 1 or size % 4 or width % size:
        raise RecipeError(
            f"kv_cache: a group must be a multiple of 4 that divides the {width} numbers of a head,"
            f" not {size}"
        )
    return None if size == width else size


def _stored_elements(model: PreTrainedModel, family: Family) -> int:
    """Numbers that a checkpoint holds: a head that is tied to the embedding is not stored."""
    tied = f"{family.head}." if text_config(model).tie_word_embeddings else None
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if tied is None or not name.startswith(tied))


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the model's decoder."""
    return model.config.get_text_config(decoder=True)


def _stored_dtype(recipe: Recipe, config: PretrainedConfig) -> torch.dtype:
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)  # type: ignore[no-any-return]
    named = config.dtype or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


def check_device(device: str) -> None:
    """Raise DeviceError if the kernels do not run on that device, or it is not there."""
    kind = device.partition(":")[0]
    if not runs_on(kind):
        raise DeviceError(f"smoothq has no kernels for device '{device}'; use --device cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"PyTorch sees no GPU here for device '{device}'; use --device cpu")


def install_inputs(
    block: nn.Module, plan: BlockPlan, context: SequenceContext, name: str
) -> dict[str, InputQuantizer]:
    """Put the InputQuantizers of a plan into a block, in place; returns them by site name.

    name: the block's, for messages.
    """
    inputs = {}
    for site in plan.sites:
        full = f"{name}.{site.input_name}"
        inputs[site.site.name] = InputQuantizer(full, site.input, len(site.modules), context)
        block.set_submodule(site.input_name, inputs[site.site.name])
    return inputs


def install_linear(
    block: nn.Module, module: str, spec: WeightSpec, site_input: InputQuantizer
) -> QuantizedLinear:
    """Replace one linear of a block by an empty QuantizedLinear, and return it."""
    linear = block.get_submodule(module)
    bias = linear.get_parameter("bias") if isinstance(linear.bias, nn.Parameter) else None
    quantized = QuantizedLinear(spec, site_input, None if bias is None else bias.dtype)
    block.set_submodule(module, quantized)
    return quantized


def install(model: PreTrainedModel, plan: Plan) -> None:
    """Give a float model, on any device, the modules of a plan, empty, ready to be loaded."""
    context = SequenceContext()
    layers = model.get_submodule(plan.family.layers)
    for index, block in enumerate(plan.blocks):
        name = f"{plan.family.layers}.{index}"
        layer = layers.get_submodule(str(index))
        inputs = install_inputs(layer, block, context, name)
        for site in block.sites:
            for module, spec in site.modules.items():
                install_linear(layer, module, spec, inputs[site.site.name])
    if any(site.input.mode == "live" for block in plan.blocks for site in block.sites):
        context.attach(model.get_submodule(plan.family.base))
    if plan.residual_rotation is not None and not plan.folds_ends:
        embedding = model.get_submodule(plan.family.embedding)
        rotate_ends(embedding, model.get_submodule(plan.family.final_norm), plan.residual_rotation)
    install_attention(model, plan)


def install_attention(model: PreTrainedModel, plan: Plan) -> None:
    """Make a model's attention, and with it its KV cache, what the plan says; weights stay."""
    if plan.attention is not None:
        layers = model.get_submodule(plan.family.layers)
        named = zip(layers.children(), plan.blocks, strict=True)
        attentions = [layer.get_submodule(block.attention) for layer, block in named]
        quantize_attention(attentions, plan.attention, text_config(model))


def _site_rotations(blocks: tuple[BlockPlan, ...]) -> list[Hadamard | None]:
    return [site.input.rotation for block in blocks for site in block.sites]


def _auto_group_notes(recipe: Recipe, blocks: tuple[BlockPlan, ...]) -> list[str]:
    sites = [site for block in blocks for site in block.sites]
    chosen = []
    if recipe.weights.granularity == "group" and recipe.weights.group_size == "auto":
        specs = _weight_specs(blocks)
        chosen += [("weight", spec.grid.group_size, spec.in_features) for spec in specs]
    smooth = recipe.runtime_smoothing
    if smooth is not None and smooth.group_size == "auto" and smooth.scope != "calibrated":
        chosen += [("activation", s.input.group_size, s.input.width) for s in sites]
    return [
        f"{kind} groups chosen by 'auto': {size} of {width} channels"
        for kind, size, width in chosen
    ]


def _plan_block(layer: nn.Module, graph: BlockGraph, recipe: Recipe, index: int) -> BlockPlan:
    sites = tuple(_plan_site(layer, site, recipe, index) for site in graph.sites)
    value_rotation = None
    if recipe.rotation is not None and recipe.rotation.value_output and graph.value_output:
        heads = _value_heads(graph.value_output)
        # Each layer draws its own signs: one unlucky draw is then not repeated in all.
        value_rotation = Hadamard.of(heads.dim, recipe.seed * 1000 + index)
    return BlockPlan(graph, sites, value_rotation)


def _value_heads(site: Site) -> Heads:
    producer = site.producer
    assert isinstance(producer, Rows)
    assert producer.heads is not None
    return producer.heads


def _plan_site(layer: nn.Module, site: Site, recipe: Recipe, index: int) -> SitePlan:
    modules = {}
    for name in site.modules:
        linear = layer.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModelError(
                f"layer {index}, {name}: a {type(linear).__name__} cannot be quantized yet"
            )
        where = f"layer {index}, {name}"
        grid = _weight_grid(recipe, linear.in_features, where)
        modules[name] = WeightSpec(linear.out_features, linear.in_features, grid)
    width = next(iter(modules.values())).in_features
    return SitePlan(site, _input_spec(site, recipe, width, f"layer {index}, {site.name}"), modules)


def _weight_grid(recipe: Recipe, columns: int, where: str) -> IntegerGrid:
    weights = recipe.weights
    size = columns
    if weights.granularity == "group":
        size = _group_size(weights.group_size, columns, where)
    multiplier = weights.group_scale == "multiplier"
    return IntegerGrid(
        weights.bits, weights.granularity, size, multiplier, weights.clip, weights.full_range
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


def _input_spec(site: Site, recipe: Recipe, width: int, where: str) -> InputSpec:
    activations, smooth = recipe.activations, recipe.runtime_smoothing
    settings: dict[str, Any] = {}
    mode: Mode
    if activations.bits == FLOAT_BITS:
        mode = "float"
    elif smooth is not None:
        modes: dict[str, Mode] = {"token": "groups", "calibrated": "calibrated", "live": "live"}
        mode = modes[smooth.scope]
        if mode != "calibrated":
            settings["group_size"] = _group_size(smooth.group_size, width, where)
        settings["normalise"] = smooth.normalise
    elif activations.granularity == "tensor":
        mode = "static" if activations.static else "tensor"
    else:
        mode = "token"
        settings["full_range"] = activations.full_range
    if recipe.rotation is not None and recipe.rotation.down and site.edge == "up_down":
        settings["rotation"] = Hadamard.of(width, recipe.seed)
    return InputSpec(width, activations.bits, mode, activations.clip_ratio, **settings)


def _weight_specs(blocks: tuple[BlockPlan, ...]) -> list[WeightSpec]:
    return [spec for block in blocks for site in block.sites for spec in site.modules.values()]


def _quantized_elements(blocks: tuple[BlockPlan, ...]) -> int:
    return sum(spec.out_features * spec.in_features for spec in _weight_specs(blocks))


def _count_bits(blocks: tuple[BlockPlan, ...], cached: float) -> Bits:
    sites = [site for block in blocks for site in block.sites]
    stored = sum(spec.stored_bits for spec in _weight_specs(blocks))
    inputs = [site.input for site in sites]
    width = sum(spec.width for spec in inputs)

    def activation(tokens: int) -> float:
        return sum(spec.bits * spec.width + spec.scale_bits(tokens) for spec in inputs) / width

    return Bits(
        stored / _quantized_elements(blocks), activation(PREFILL_TOKENS), activation(1), cached
    )
