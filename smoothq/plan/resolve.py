"""Resolve a recipe for one model into a `Plan`: number formats of every site, and the sizes.

A plan needs only the model's config and shapes, no weights; models and recipes that cannot be
quantized are refused here. Loading a quantized checkpoint computes the same plan again from the
recipe in its config, so the plan itself is never stored.
"""

from __future__ import annotations

import fnmatch
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..architectures.sensitive import float_by_default
from ..errors import RecipeError
from ..recipe.recipe import FLOAT_BITS, Recipe
from .attention import plan_attention
from .notes import notes_on
from .plan import Plan
from .sites import plan_blocks, plan_towers, residual_rotation
from .wiring import Wiring


def make_plan(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Resolve a recipe for a model.

    Args:
        model: the float model; it may be on the meta device, as only shapes are read.
        recipe: the recipe to resolve.

    Raises:
        UnsupportedModelError: the model cannot be quantized.
        RecipeError: the recipe does not fit the model.
    """
    return resolve(Wiring.of(model), recipe)


def resolve(wiring: Wiring, recipe: Recipe) -> Plan:
    """Resolve a recipe for a model whose wiring is known; else as `make_plan`."""
    _check_scope(wiring, recipe)
    sensitive = _sensitive(wiring, recipe)
    recipe = recipe.edit(keep=(*recipe.keep, *sensitive)) if sensitive else recipe
    read = _read_and_not_kept(wiring, recipe)
    recipe = recipe.edit(keep=(*recipe.keep, *read)) if read else recipe
    plan = Plan(
        recipe=recipe,
        wiring=wiring,
        blocks=plan_blocks(wiring, recipe),
        residual_rotation=residual_rotation(wiring, recipe),
        attention=plan_attention(wiring, recipe),
        towers=plan_towers(wiring, recipe),
    )
    if not any(block.sites for block in plan.blocks):
        raise RecipeError("keep leaves no linear to quantize; give fewer patterns")
    _check_patterns(plan)
    _check_embedding(plan)
    return replace(plan, notes=notes_on(plan, read, sensitive))


def _check_scope(wiring: Wiring, recipe: Recipe) -> None:
    """Refuse scales over a sequence where blocks mix the tokens of several."""
    smooth = recipe.runtime_smoothing
    if wiring.family.flattens and smooth is not None and smooth.scope == "live":
        raise RecipeError(
            f"{wiring.config.model_type}: live runtime smoothing needs whole sequences, and its "
            "blocks join the tokens of all sequences before some linears; use "
            "runtime_smoothing.scope=token"
        )


def _sensitive(wiring: Wiring, recipe: Recipe) -> dict[str, str]:
    """Patterns of linears that stay in float unless an override names them: see `sensitive`."""
    named = [name for name in wiring.linears if recipe.override(name) is None]
    patterns = float_by_default(name for name in named if not recipe.keeps(name))
    asked = {override.match for override in recipe.overrides}
    return {pattern: does for pattern, does in patterns.items() if pattern not in asked}


def _read_and_not_kept(wiring: Wiring, recipe: Recipe) -> list[str]:
    """The linears whose weights the model's code reads, and which the recipe would quantize."""
    ends = wiring.parts.ends if recipe.embeddings == FLOAT_BITS else ()
    return [name for name in wiring.read if name not in ends and not recipe.keeps(name)]


def _check_patterns(plan: Plan) -> None:
    """Refuse patterns that match nothing: a typing error in `keep` would quantize the linear."""
    recipe, outside = plan.recipe, plan.wiring.float_matrices
    names = (*plan.wiring.linears, *plan.towers)
    overrides = [override.match for override in recipe.overrides]
    for pattern in (*recipe.keep, *overrides):
        if fnmatch.filter(names, pattern):
            continue
        if pattern in overrides and fnmatch.filter(outside, pattern):
            raise RecipeError(
                f"the pattern '{pattern}' matches linears outside of the text model alone, which "
                "stay in float: give the override weights, or set vision to 8"
            )
        if not fnmatch.filter(outside, pattern):  # kept as all outside of the text model is
            raise RecipeError(
                f"the pattern '{pattern}' matches no linear of the model; they are called like "
                f"'{names[0]}'"
            )


def _check_embedding(plan: Plan) -> None:
    """Refuse codes for an embedding that does more than look rows up."""
    if plan.tables and plan.wiring.embedding_class is not nn.Embedding:
        raise RecipeError(
            f"{plan.parts.embedding} is a {plan.wiring.embedding_class.__name__}, which does more "
            "than look rows up: it cannot be stored in 8 bits; leave embeddings at 16"
        )
