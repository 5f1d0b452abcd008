"""Who can run what a recipe makes, by which operators, and what it costs beside the alternatives.

Read off the plan and, for this machine's processor, timed on random weights; for other chips a
bound by their data sheets. No weight of the model is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ..architectures.attention_support import unquantizable_attention
from ..architectures.graph import is_tied, text_config
from ..discovery.experiments import EXPERT_COUNTS
from ..errors import RecipeError, SmoothqError, UnsupportedModelError
from ..modules import (
    InputQuantizer,
    QuantizedLinear,
    SequenceContext,
    WeightSpec,
)
from ..plan.plan import Plan, SitePlan
from ..plan.portability import export_blockers, refuse_in_plugin
from ..plan.resolve import float_bytes, make_plan
from ..recipe.presets import preset
from ..recipe.recipe import FLOAT_BITS, Preset
from ..report.table import columns
from ..rounding.rtn import round_to_nearest

PROMPT = 512  # tokens of a prompt
TIMED_WEIGHTS = 1 << 23  # of a linear that is timed, at most
REPETITIONS = 5
FLOAT_PRODUCTS = "16-bit float"
PRESETS: tuple[Preset, ...] = ("w8a8", "w4a16", "w4a8", "w4a4")


@dataclass(frozen=True)
class Chip:
    """A GPU by its data sheet: bytes a second of memory, dense operations a second."""

    name: str
    architecture: str
    bandwidth: float
    bfloat16: float
    int8: float


A100 = Chip("A100 SXM", "sm_80", 2.039e12, 312e12, 624e12)
H100 = Chip("H100 SXM", "sm_90", 3.35e12, 989e12, 1979e12)
CHIPS = (A100, H100)


@dataclass(frozen=True)
class Runner:
    """Something that could run the result. how: the operators, or why it cannot."""

    name: str
    runs: bool
    how: str


@dataclass(frozen=True)
class Cost:
    """What a recipe costs to run.

    weight, activation: bits an element, every scale counted. nbytes: of all tensors; read: of what
    a decoded token reads. products: the type in which matrices are multiplied. decode: tokens a
    second, at most, and prompt: seconds of 512 tokens' products, at least, by chip. here: times
    as fast as float on this machine's processor, measured: one token, and a prompt.
    """

    name: str
    weight: float
    activation: float
    nbytes: int
    read: int
    products: str
    decode: dict[str, float]
    prompt: dict[str, float]
    here: tuple[float, float]


@dataclass(frozen=True)
class PlanAdvice:
    """runners: who can run a recipe's result. costs: of float, the presets, and the recipe itself.

    refused: presets that this model cannot take, and features that its family cannot, with why.
    """

    runners: tuple[Runner, ...]
    costs: tuple[Cost, ...]
    refused: dict[str, str]


@torch.no_grad()
def advise(model: PreTrainedModel, plan: Plan) -> PlanAdvice:
    """What is ahead of a plan for a model, which may be on the meta device."""
    refused: dict[str, str] = {}
    plans: dict[str, Plan] = {}
    for name in PRESETS:
        try:
            plans[name] = make_plan(model, preset(name).edit(dtype=plan.recipe.dtype))
        except (RecipeError, UnsupportedModelError) as error:
            refused[f"--{name}"] = str(error)
    asked = next((name for name, each in plans.items() if each.recipe == plan.recipe), None)
    if asked is None:
        plans["as asked"] = plan
    else:
        plans = {f"{name}, as asked" if name == asked else name: e for name, e in plans.items()}
    reason = unquantizable_attention(text_config(model), type(model))
    if reason is not None:
        refused["--kv-bits, --attention"] = reason
    if plan.family.flattens:
        refused["--smooth-scope live"] = "its blocks join the tokens of all sequences"
    costs = [_float_cost(model, plan), *(_cost(name, model, each) for name, each in plans.items())]
    return PlanAdvice(tuple(_runners(model, plan)), tuple(costs), refused)


def _runners(model: PreTrainedModel, plan: Plan) -> list[Runner]:
    found = [_runner(f"this processor ({_processor()})", plan, "cpu")]
    found += [_runner(f"{chip.name} ({chip.architecture})", plan, "cuda") for chip in CHIPS]
    ours = "after `import smoothq`: the format's modules and operators are smoothq's"
    found.append(Runner("transformers", True, ours))
    in_the_way = "; ".join(map(str, export_blockers(model, plan)))
    how = "after `smoothq export`; `smoothq plan` of that names vLLM's kernels"
    without = "transformers without smoothq, vLLM"
    found.append(Runner(without, not in_the_way, in_the_way or how))
    refusal = ""
    try:
        refuse_in_plugin(model, plan)
    except SmoothqError as error:
        refusal = str(error)
    plugin = "by its plugin, with the operators above; not in tensor parallel"
    found.append(Runner("vLLM with smoothq installed", not refusal, refusal or plugin))
    return found


def _runner(name: str, plan: Plan, device: str) -> Runner:
    """A kind of device, with the operators that the sites of the blocks run there."""
    try:
        by_operators: dict[tuple[str, ...], list[str]] = {}
        for _, _, site in plan.sites():
            for spec in site.modules.values():
                operators = spec.operators(site.input, torch.device(device))
                stages = by_operators.setdefault(operators, [])
                if site.site.stage not in stages:
                    stages.append(site.site.stage)
    except NotImplementedError as error:
        return Runner(name, True, f"its operators cannot be listed here: {error}")
    lines = (f"{', '.join(names)}: {' → '.join(ops)}" for ops, names in by_operators.items())
    return Runner(name, True, "; ".join(lines))


def _processor() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _float_cost(model: PreTrainedModel, plan: Plan) -> Cost:
    """Of the model as it is."""
    nbytes, size = float_bytes(model), plan.stored_dtype.itemsize
    routed = _routed_share(model, plan)
    linears = 2.0 * PROMPT * sum(_elements(site, routed) for site in _sites(plan))
    embedding = model.get_submodule(plan.parts.embedding).get_parameter("weight").numel()
    resting = sum(
        (1 - _share(site, routed)) * size * spec.elements
        for site in _sites(plan)
        for spec in site.modules.values()
    )
    read = nbytes - resting - (0 if is_tied(model) else size * embedding)
    return Cost(
        name="float",
        weight=8.0 * size,
        activation=8.0 * size,
        nbytes=nbytes,
        read=int(read),
        products=FLOAT_PRODUCTS,
        decode={chip.name: chip.bandwidth / read for chip in CHIPS},
        prompt={chip.name: linears / chip.bfloat16 for chip in CHIPS},
        here=(1.0, 1.0),
    )


def _cost(name: str, model: PreTrainedModel, plan: Plan) -> Cost:
    rows, columns = model.get_submodule(plan.parts.embedding).get_parameter("weight").shape
    embedding = rows * (columns + 2) if plan.tables else rows * columns * plan.stored_dtype.itemsize
    routed = _routed_share(model, plan)
    resting = sum(
        (1 - _share(site, routed)) * spec.stored_bits / 8
        for site in _sites(plan)
        for spec in site.modules.values()
    )
    read = plan.total_bytes - resting - (0 if is_tied(model) else embedding)
    linears = 2.0 * PROMPT * sum(_elements(site, routed) for site in _sites(plan))
    bits = plan.recipe.activations.bits
    integers = "int8" if bits == 8 else f"int8 ({bits}-bit codes)"
    floats = bits == FLOAT_BITS
    return Cost(
        name=name,
        weight=plan.bits.weight,
        activation=plan.bits.activation,
        nbytes=plan.total_bytes,
        read=int(read),
        products=FLOAT_PRODUCTS if floats else integers,
        decode={chip.name: chip.bandwidth / read for chip in CHIPS},
        prompt={c.name: linears / (c.bfloat16 if floats else c.int8) for c in CHIPS},
        here=_timed(max(_sites(plan), key=lambda site: site.input.width)),
    )


def _sites(plan: Plan) -> list[SitePlan]:
    return [site for _, _, site in plan.sites()]


def _elements(site: SitePlan, routed: float) -> float:
    """Weights of a site that one token meets."""
    return _share(site, routed) * sum(spec.elements for spec in site.modules.values())


def _share(site: SitePlan, routed: float) -> float:
    """Which share of a site's weights one token meets; routed: of experts."""
    return routed if site.site.routed else 1.0


def _routed_share(model: PreTrainedModel, plan: Plan) -> float:
    """Which share of a layer's experts one token is sent to."""
    if not any(site.site.routed for site in _sites(plan)):
        return 1.0
    config = text_config(model)
    experts = next(getattr(config, name) for name in EXPERT_COUNTS if hasattr(config, name))
    passed: float = min(1.0, getattr(config, "num_experts_per_tok", 2) / experts)
    return passed


def _timed(site: SitePlan) -> tuple[float, float]:
    """How many times as fast as float32 a linear of a site runs here: one token, and a prompt."""
    spec = next(iter(site.modules.values()))
    width, grid = spec.in_features, replace(spec.grid, clip=False)
    rows = min(spec.out_features, max(1, TIMED_WEIGHTS // width))
    weight = torch.randn(rows, width, dtype=torch.float32)
    site_input = InputQuantizer("timed", site.input, 1, SequenceContext())
    if site_input.rotation is not None:
        site_input.rotation.prepare(weight.device)
    quantized = QuantizedLinear(WeightSpec(rows, width, grid), site_input, weight.dtype)
    quantized.set_weight(round_to_nearest(weight, grid), None)
    dense = nn.Linear(width, rows, bias=False, dtype=torch.float32)
    dense.weight.data = weight
    times = []
    for tokens in (1, PROMPT):
        x = torch.randn(1, tokens, width, dtype=torch.float32)
        times.append(_ratio(lambda x=x: dense(x), lambda x=x: quantized(x)))  # type: ignore[misc]
    return times[0], times[1]


def _ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """The medians' ratio of two calls that run in turns."""
    spent: dict[Callable[[], object], list[float]] = {slow: [], fast: []}
    for turn in range(REPETITIONS + 1):
        for call, times in spent.items():
            start = time.perf_counter()
            call()
            if turn:  # the first compiles and fills caches
                times.append(time.perf_counter() - start)
    return statistics.median(spent[slow]) / statistics.median(spent[fast])


def tables(ahead: PlanAdvice) -> list[Table]:
    """What `smoothq plan` prints of it."""
    found = [
        columns(
            "Who can run it",
            ("", "runs", "by"),
            [(each.name, "yes" if each.runs else "no", each.how) for each in ahead.runners],
        ),
        columns(
            "What it costs beside the alternatives; speed of the widest linear measured on this "
            "processor, times float32",
            ("", "bits", "inputs", "GB", "GB a token", "products in", "1 token", f"{PROMPT}"),
            [
                (
                    cost.name,
                    *(f"{value:.2f}" for value in (cost.weight, cost.activation)),
                    *(f"{value / 1e9:.2f}" for value in (cost.nbytes, cost.read)),
                    cost.products,
                    *(f"{value:.1f}" for value in cost.here),
                )
                for cost in ahead.costs
            ],
        ),
        columns(
            "Bounds computed from data sheets, batch 1: tokens decoded a second at most, ms of "
            f"the products of a prompt of {PROMPT} tokens at least",
            ("", *(f"{chip.name}, {what}" for chip in CHIPS for what in ("tokens/s", "ms"))),
            [
                (
                    cost.name,
                    *(
                        text
                        for chip in CHIPS
                        for text in (
                            f"{cost.decode[chip.name]:.0f}",
                            f"{1e3 * cost.prompt[chip.name]:.2f}",
                        )
                    ),
                )
                for cost in ahead.costs
            ],
        ),
    ]
    if ahead.refused:
        title = "What this model cannot take"
        found.append(columns(title, ("", "because"), list(ahead.refused.items())))
    return found
