"""A recipe's KV cache and attention resolved for one model, or refused with the reason."""

from __future__ import annotations

from ..architectures.attention_support import unquantizable_attention
from ..errors import RecipeError, UnsupportedModelError
from ..modules import AttentionSpec, CacheFormat
from ..recipe.recipe import KvCache, Recipe
from ..transforms.hadamard import Hadamard
from .wiring import Wiring

AUTO_HEAD_GROUPS = (32, 16, 8)  # of a 4-bit KV cache


def plan_attention(wiring: Wiring, recipe: Recipe) -> AttentionSpec | None:
    """How a model's attention and KV cache are quantized, or None if the recipe keeps them float.

    Args:
        wiring: of the model.
        recipe: the recipe to resolve.

    Raises:
        UnsupportedModelError: the model's attention is not plain softmax attention that can be
            replaced.
        RecipeError: the group size does not divide the head dimension.
    """
    if not recipe.quantizes_attention:
        return None
    reason = float_attention(wiring)
    if reason is not None:
        raise UnsupportedModelError(
            f"{wiring.config.model_type}: attention cannot be quantized: {reason}; leave kv_cache "
            "and attention out of the recipe"
        )
    if recipe.kv_cache is None:
        return AttentionSpec(product=recipe.attention)
    width, wanted = wiring.head_dim, recipe.kv_cache
    rotated = wanted.bits == 4 if wanted.rotate_keys == "auto" else wanted.rotate_keys
    cache = CacheFormat(wanted.bits, _head_group(recipe, wanted, width), wanted.float_tokens)
    rotation = Hadamard.of(width, recipe.seed) if rotated else None
    return AttentionSpec(cache, recipe.attention, rotation)


def float_attention(wiring: Wiring) -> str | None:
    """Why a model's KV cache and attention cannot be quantized, or None where they can."""
    reason = unquantizable_attention(wiring.config, wiring.model_class)
    if reason is None and any(graph.value_output is None for graph in wiring.graphs):
        reason = "its values do not reach the output projection unchanged"
    return reason


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
