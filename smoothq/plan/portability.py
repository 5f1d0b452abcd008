"""Which parts of a recipe other programs cannot run, and the nearest recipe without these parts.

An exported checkpoint, such as one in the compressed-tensors format, contains linears and how
their inputs are quantized. Other operations at run time, such as the rotation of an input, cannot
be expressed in it: a reader would skip them without an error and compute wrong results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import RecipeError, UnsupportedModelError
from ..kernels import highest_code
from ..modules import InputSpec
from ..recipe.recipe import FLOAT_BITS, Recipe
from .plan import Plan, SitePlan
from .resolve import resolve
from .wiring import Wiring

# Families that smoothq's vLLM plugin serves: vLLM's modules have the checkpoint's names, the final
# norm is an RMSNorm without bias, and the outputs were compared with those of transformers.
PLUGIN_FAMILIES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Recipe name → perplexity of SmolLM2-135M-Instruct with the recipe, and with its exportable form:
# 12 windows of 2,048 tokens of WikiText-2's test split, float 19.87; docs/serving.md has the
# commands.
MEASURED = {"w4a16": (21.34, 21.48), "w4a8": (21.26, 21.40), "w4a4": (24.89, 50.38)}
SERVED_BITS = (4, 8, FLOAT_BITS)  # bits of activations that servers can run


@dataclass(frozen=True)
class ExportBlocker:
    """One reason why a plan cannot be exported: an operation that only smoothq runs.

    Attributes:
        what: the reason, for messages.
        edit: changed recipe fields that avoid the operation, as keyword arguments of
            `Recipe.edit`; empty if no field does.
        instead: what the user can choose if no recipe field avoids the operation.
        where: the stages of the blocks where the operation occurs, or "the model".
    """

    what: str
    edit: dict[str, Any] = field(default_factory=dict)
    instead: str = ""
    where: str = "the model"

    def __str__(self) -> str:
        return f"{self.where}: {self.what} (take {self.instead or _as_text(self.edit)})"


def export_blockers(model: PreTrainedModel, plan: Plan) -> list[ExportBlocker]:
    """Every reason why a plan's checkpoint cannot be exported to another format; empty if it can.

    Args:
        model: the float model on the meta device.
        plan: its plan.
    """
    blockers: dict[str, tuple[ExportBlocker, list[str]]] = {}  # by reason, with the stages
    for _, layer, block in plan.named_blocks(model):
        for site in block.sites:
            for blocker in _of_site(layer, site, plan):
                _, stages = blockers.setdefault(blocker.what, (blocker, []))
                if site.site.stage not in stages:
                    stages.append(site.site.stage)
        for module in block.new_biases:
            blockers.setdefault(_BIAS.what, (_BIAS, []))[1].append(module)
    of_sites = [replace(blocker, where=", ".join(stages)) for blocker, stages in blockers.values()]
    return [*of_sites, *_of_model(model, plan)]


def refuse_blockers(model: PreTrainedModel, plan: Plan, name: str, form: str) -> None:
    """Raise RecipeError listing the blockers of a plan that cannot be exported.

    Args:
        model: the float model on the meta device.
        plan: its plan.
        name: the model's name, for the message.
        form: the name of the export format, for the message.
    """
    blockers = export_blockers(model, plan)
    if blockers:
        raise RecipeError(
            f"{name}: {form} cannot hold what this recipe makes. "
            f"{'; '.join(map(str, blockers))}. With servable=True it leaves out what it must"
        )


def make_exportable(
    model: PreTrainedModel, recipe: Recipe, wiring: Wiring | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe edited so that its result can be exported.

    Blockers that no recipe field avoids, such as a family's experts, remain: `export_blockers`
    lists them.

    Args:
        model: the float model on the meta device.
        recipe: the recipe to edit.
        wiring: of the model, if it is known already.

    Returns: the edited recipe, and one line for each changed field.
    """
    wiring, edits = wiring or Wiring.of(model), dict[str, Any]()
    while True:
        blockers = export_blockers(model, resolve(wiring, recipe.edit(**edits)))
        more = {path: value for blocker in blockers for path, value in blocker.edit.items()}
        if more.items() <= edits.items():
            return recipe.edit(**edits), tuple(
                _as_text({path: value}) for path, value in edits.items()
            )
        edits |= more


def refuse_in_plugin(plan: Plan) -> None:
    """Refuse a plan that smoothq's plugin for vLLM cannot serve.

    Raises:
        UnsupportedModelError: the plugin does not serve the model's family.
        RecipeError: the recipe has scales over several tokens, or quantizes attention.
    """
    family = plan.wiring.config.model_type
    if family not in PLUGIN_FAMILIES:
        raise UnsupportedModelError(
            f"smoothq's vLLM plugin serves {', '.join(PLUGIN_FAMILIES)}, not {family}; load the "
            "checkpoint in transformers"
        )
    if any(site.input.mode in ("smooth_live", "tensor", "fp_tensor") for site in plan.sites):
        raise RecipeError(
            "vLLM mixes the tokens of many sequences, and this recipe has scales over all of a "
            "forward's tokens; use runtime_smoothing.scope=token, or one scale a token"
        )
    if any(spec.floating or fed.emulated for _, spec, fed in plan.linears()):
        raise RecipeError(
            "smoothq's vLLM plugin runs integer codes, and this recipe has floating-point ones; "
            "give vLLM an export: servable=True and format='compressed-tensors'"
        )
    if plan.attention is not None:
        raise RecipeError(
            "vLLM has an attention and a KV cache of its own; quantize without kv_cache and "
            "attention, and give vLLM --kv-cache-dtype"
        )
    if plan.towers:
        raise RecipeError(
            "smoothq's vLLM plugin runs towers in float, and this recipe quantizes their linears; "
            "leave vision at 16"
        )


def cost_of(recipe: Recipe) -> str:
    """A sentence on the perplexity that a recipe's exportable form loses, by the recipe's name."""
    if recipe.name not in MEASURED:
        return "what that costs in perplexity was measured for --w4a16, --w4a8 and --w4a4 alone"
    before, after = MEASURED[recipe.name]
    return f"on SmolLM2-135M, measured, that took perplexity from {before:.2f} to {after:.2f}"


_BIAS = ExportBlocker(
    "the norm before it hands it a bias that the model's own class has no place for",
    {"rotation__residual": False},
)
_ROTATION = {"residual": "residual", "attention": "value_output", "mlp": "down"}


def _of_site(layer: nn.Module, plan: SitePlan, model_plan: Plan) -> Iterator[ExportBlocker]:
    site = plan.site
    if plan.input.rotation is not None:
        by_choice = model_plan.recipe.rotates.residual == "online" and model_plan.wiring.rotatable
        offline = site.reads == "residual" and by_choice
        edit = {f"rotation__{_ROTATION[site.reads]}": offline}
        yield ExportBlocker("its input is rotated while the model runs", edit)
    yield from input_blockers(plan.input)
    if site.routed:
        yield ExportBlocker(
            "experts are held apart here, and together elsewhere", {}, "a dense model"
        )
        return
    for name in plan.modules:
        linear = layer.get_submodule(name)
        kind = type(linear).__name__
        if not isinstance(linear, nn.Linear):
            yield ExportBlocker(f"it is a {kind}, and readers know nn.Linear", {}, "another model")
        elif type(linear) is not nn.Linear and plan.modules[name].grid.bits != 8:
            what = f"it is a {kind}, which transformers cannot read packed codes into"
            yield ExportBlocker(what, {}, "--w8a8")
        elif plan.adds_bias and linear.bias is None:
            yield _BIAS
    grids = {
        (spec.grid.bits, spec.groups, spec.grid.symmetric, spec.grid.element)
        for spec in plan.modules.values()
    }
    if site.float_readers or len(grids) > 1:
        what = "servers hold all that reads one tensor as one matrix, and here formats differ"
        yield ExportBlocker(what, {}, "one format for them, or keep all of them in float")
    if plan.input.mode == "fp_group" and plan.input.width % plan.input.group_size:
        what = f"its groups of {plan.input.group_size} do not divide its input"
        yield ExportBlocker(what, {}, "FP8 weights per channel, and activations per token")
    if plan.input.mode == "static" and grids != {(8, 1, True, "int")}:
        what = "static scales go with 8-bit weights per channel"
        yield ExportBlocker(what, {}, "activations.granularity: token, static: false")


def input_blockers(spec: InputSpec) -> Iterator[ExportBlocker]:
    """What servers cannot run of how an input is quantized."""
    if spec.smoothed:
        yield ExportBlocker(
            "its input is smoothed while the model runs", {"runtime_smoothing": None}
        )
    elif spec.mode in ("tensor", "fp_tensor"):
        edit = {"activations__granularity": "token"}
        yield ExportBlocker("its input has one scale a tensor, found while the model runs", edit)
    elif spec.mode == "token" and spec.clip not in _clips(spec.bits):
        what = f"its input's largest code stands for {spec.clip:g} of each token's maximum"
        yield ExportBlocker(what, {"activations__clip_ratio": reader_clip(spec.bits)})
    elif spec.mode == "token" and spec.full_range:
        yield ExportBlocker("its input's scales have a sign", {"activations__full_range": False})
    if spec.mode != "float" and spec.bits not in SERVED_BITS:
        what = f"no server multiplies {spec.bits}-bit activations"
        yield ExportBlocker(what, {}, "activations.bits: 4, 8 or 16")


def reader_clip(bits: int) -> float:
    """The clip ratio at which a token's scale is the format's: maximum / (2^(bits − 1) − ½)."""
    highest: int = highest_code(bits)
    return highest / (highest + 0.5)


def _clips(bits: int) -> tuple[float, ...]:
    """Clip ratios that servers can run; at 8 bits also 1: their kernels differ by as much."""
    return (reader_clip(bits), 1.0) if bits == 8 else (reader_clip(bits),)


def _of_model(model: PreTrainedModel, plan: Plan) -> Iterator[ExportBlocker]:
    if plan.parts.head is None:
        what = f"{type(model).__name__} has no head that predicts tokens"
        yield ExportBlocker(what, {}, "a causal LM")
    if plan.attention is not None:
        edit = {"kv_cache": None, "attention": "float"}
        yield ExportBlocker("keys, values or their products are quantized by our attention", edit)
    if plan.towers:
        what = "linears of vision or audio towers are quantized, and servers hold these in float"
        if plan.recipe.vision == FLOAT_BITS:
            yield ExportBlocker(what, {}, "no override of the towers' linears")
        else:
            yield ExportBlocker(what, {"vision": FLOAT_BITS})
    if plan.tables:
        yield ExportBlocker("embedding and head are held in 8 bits", {"embeddings": FLOAT_BITS})
    if plan.residual_rotation is not None and not plan.wiring.family.folds_offline(model):
        what = "the residual stream is rotated at its ends while the model runs"
        yield ExportBlocker(what, {"rotation__residual": False})


def _as_text(edit: dict[str, Any]) -> str:
    return ", ".join(
        f"{path.replace('__', '.')}: {'null' if value is None else str(value).lower()}"
        for path, value in edit.items()
    )
