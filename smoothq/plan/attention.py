"""A recipe's KV cache and attention resolved for one model, or refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..architectures import BlockGraph, Rows
from ..architectures.attention_support import unquantizable_attention
from ..architectures.graph import text_config
from ..errors import RecipeError, UnsupportedModelError
from ..modules import AttentionSpec, CacheFormat
from ..recipe.recipe import FLOAT_BITS, KvCache, Recipe
from ..transforms.hadamard import Hadamard

AUTO_HEAD_GROUPS = (32, 16, 8)  # of a 4-bit KV cache


def plan_attention(
    model: PreTrainedModel, graphs: Sequence[BlockGraph], recipe: Recipe
) -> AttentionSpec | None:
    """How a model's attention and KV cache are quantized, or None if the recipe keeps them float.

    Args:
        model: the float model; only its config and class are read.
        graphs: the wiring of every block.
        recipe: the recipe to resolve.

    Raises:
        UnsupportedModelError: the model's attention is not plain softmax attention that can be
            replaced.
        RecipeError: the group size does not divide the head dimension.
    """
    if not recipe.quantizes_attention:
        return None
    config = text_config(model)
    reason = unquantizable_attention(config, type(model))
    if reason is None and any(graph.value_output is None for graph in graphs):
        reason = "its values do not reach the output projection unchanged"
    if reason is not None:
        raise UnsupportedModelError(
            f"{config.model_type}: attention cannot be quantized: {reason}; leave kv_cache and "
            "attention out of the recipe"
        )
    if recipe.kv_cache is None:
        return AttentionSpec(product=recipe.attention)
    width, wanted = _head_width(graphs), recipe.kv_cache
    rotated = wanted.bits == 4 if wanted.rotate_keys == "auto" else wanted.rotate_keys
    cache = CacheFormat(wanted.bits, _head_group(recipe, wanted, width), wanted.float_tokens)
    rotation = Hadamard.of(width, recipe.seed) if rotated else None
    return AttentionSpec(cache, recipe.attention, rotation)


def cached_bits(attention: AttentionSpec | None, graphs: Sequence[BlockGraph]) -> float:
    """Average bits per number in the KV cache, scales and offsets included; 16 if it is float."""
    if attention is None or attention.cache is None:
        return FLOAT_BITS
    return attention.cache.stored_bits(_head_width(graphs))


def _head_width(graphs: Sequence[BlockGraph]) -> int:
    """The head dimension, from the shapes of the model's value projection."""
    site = graphs[0].value_output
    assert site is not None
    assert isinstance(site.producer, Rows)
    assert site.producer.heads is not None
    return site.producer.heads.dim


def _head_group(recipe: Recipe, wanted: KvCache, width: int) -> int | None:
    """How many numbers of a head share a scale in the cache; None for the whole head."""
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
