"""The command that asks what a recipe comes to before any work: plan."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..report.table import pairs
from .common import (
    Device,
    Json,
    Model,
    Servable,
    TrustRemoteCode,
    parse_memory,
    silence_transformers,
)
from .recipe_flags import RecipeFlags, takes_recipe
from .terminal import out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plan.plan import Plan
    from ..report.results import ResourceEstimate


@takes_recipe
def plan(
    model: Model,
    flags: RecipeFlags,
    max_memory: Annotated[
        str | None, typer.Option(help="Memory that quantizing may take, such as 8GB; or refuse.")
    ] = None,
    device: Device = "auto",
    servable: Servable = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe comes to for MODEL, who can run it, and what it costs; reads no weight.

    Of an export, without a recipe: which of vLLM's kernels would run its layers.

    Example: smoothq plan MODEL --w4a4
    """
    from ..advisor.costs import advise, tables
    from ..api import planned
    from ..checkpoint.formats.choose import as_float
    from ..checkpoint.model_config import read_config
    from ..checkpoint.skeleton import skeleton_of
    from ..export import schemes as compressed_tensors
    from ..pipeline.estimate import estimate_resources
    from ..report import figures as report
    from ..runtime.device import resolve_device

    silence_transformers()
    config = read_config(model, trust_remote_code)
    quantization = getattr(config, "quantization_config", None) or {}
    exported = quantization.get("quant_method") == compressed_tensors.METHOD
    if exported and not flags.name_a_recipe:
        _plan_export(skeleton_of(config, model), quantization, as_json)
        return
    recipe = flags.chosen()
    device = resolve_device(device)
    config, encoded = as_float(config, model)
    empty = skeleton_of(config, model)
    _, resolved = planned(empty, model, recipe, servable=servable)
    if encoded is not None:
        resolved = replace(resolved, notes=(*resolved.notes, encoded.note))
    needs = estimate_resources(resolved, parse_memory(max_memory))
    before = resolved.wiring.nbytes
    advice = advise(empty, resolved)
    print_plan(model, before, resolved, device, needs, as_json, {"outlook": asdict(advice)})
    if as_json:
        return
    for table in tables(advice):
        out.print(table, soft_wrap=False)
    for line in report.remarks(resolved, model):
        out.print(line)


def print_plan(
    model: str,
    before: int,
    plan: Plan,
    device: str,
    needs: ResourceEstimate,
    as_json: bool,
    more: dict[str, Any] | None = None,
) -> None:
    """Print what quantizing comes to and takes; before: bytes of the float model; more: of JSON."""
    import torch

    from ..pipeline.estimate import estimate_time
    from ..report import figures as report

    estimate = estimate_time(plan, torch.device(device))
    if as_json:
        figures = report.plan_as_dict(model, before, plan, estimate, needs)
        print(json.dumps(figures | (more or {})))
    else:
        rows = report.plan_rows(before, plan, estimate, needs)
        out.print(pairs(f"{model}, as planned", rows))


def _plan_export(empty: PreTrainedModel, quantization: dict[str, Any], as_json: bool) -> None:
    """Print which of vLLM's kernels would run an export."""
    from ..advisor.vllm_kernels import layer_kernels, remarks, table

    layers = layer_kernels(empty, quantization)
    if as_json:
        print(json.dumps([asdict(layer) for layer in layers]))
        return
    out.print(table(layers), soft_wrap=False)
    for line in remarks(layers):
        out.print(line)
