"""What a plan costs to run, beside float and the presets, for `smoothq plan`.

Bits and bytes are counted from the plan. Speed is a roofline bound for the GPUs of `CHIPS`, and a
micro-benchmark of one linear with random weights on this machine's CPU. No weight of the model is
read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from ..architectures.attention_support import unquantizable_attention
from ..discovery.shrink import EXPERT_COUNTS
from ..errors import RecipeError, UnsupportedModelError
from ..modules import InputQuantizer, QuantizedLinear, WeightSpec
from ..plan.plan import Plan, SitePlan
from ..plan.resolve import resolve
from ..recipe.presets import preset
from ..recipe.recipe import FLOAT_BITS, Preset
from ..report.table import columns
from ..rounding.rtn import round_to_nearest
from .chips import CHIPS
from .runners import Runner, list_runners

PROMPT = 512  # tokens of the prompt that is bounded and timed
TIMED_WEIGHTS = 1 << 23  # weights of the linear that is timed, at most
REPETITIONS = 5  # timed calls of which the median is taken
TIMED_SECONDS = 0.5  # after which no more are timed
FLOAT_PRODUCTS = "16-bit float"
PRESETS: tuple[Preset, ...] = ("w8a8", "w4a16", "w4a8", "w4a4")


@dataclass(frozen=True)
class Cost:
    """Size of a model under one recipe, bounds on its speed on GPUs, and its speed on this CPU.

    Attributes:
        name: the recipe's name; `float` is the unquantized model.
        weight: bits a weight, scales and zero points counted, averaged over all linears.
        activation: bits an element of the linears' inputs, scales counted, averaged likewise.
        nbytes: bytes of all tensors of the checkpoint.
        read: bytes of the weights that decoding one token reads: all tensors without an untied
            embedding and without the experts that the token is not sent to.
        products: the dtype in which matrices are multiplied.
        decode: upper bound on decoded tokens a second at batch 1, by chip name: memory bandwidth
            over `read`.
        prompt: lower bound on the seconds of a prompt of 512 tokens, by chip name: operations of
            the linears over the chip's peak.
        here: speedup over float32 of the site with the widest input, measured on this machine's
            CPU: with one token, and with 512.
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
    """What `smoothq plan` says of a plan beside its figures.

    Attributes:
        runners: devices and programs, with whether they can run the checkpoint.
        costs: of the float model, of every preset that the model can take, and of the plan.
        refused: reasons by preset or field, for presets that the model cannot take and
            features that its family does not have.
    """

    runners: tuple[Runner, ...]
    costs: tuple[Cost, ...]
    refused: dict[str, str]


@torch.no_grad()
def advise(model: PreTrainedModel, plan: Plan) -> PlanAdvice:
    """List who can run a plan's checkpoint, and what it costs beside float and the presets.

    Args:
        model: the float model, which may be on the meta device: no weight is read.
        plan: its plan.
    """
    refused: dict[str, str] = {}
    plans: dict[str, Plan] = {}
    for name in PRESETS:
        try:
            plans[name] = resolve(plan.wiring, preset(name).edit(dtype=plan.recipe.dtype))
        except (RecipeError, UnsupportedModelError) as error:
            refused[name] = str(error)
    # The plan's own row: a preset's, renamed, or one more.
    asked = next((name for name, other in plans.items() if other.recipe == plan.recipe), None)
    if asked is None:
        plans["as asked"] = plan
    else:
        plans = {
            f"{name}, as asked" if name == asked else name: other for name, other in plans.items()
        }
    reason = unquantizable_attention(plan.wiring.config, plan.wiring.model_class)
    if reason is not None:
        refused["kv_cache, attention"] = reason
    if plan.wiring.family.flattens:
        refused["runtime_smoothing.scope=live"] = "its blocks join the tokens of all sequences"
    costs = [_cost("float", plan, quantized=False)]
    costs += [_cost(name, other) for name, other in plans.items()]
    return PlanAdvice(tuple(list_runners(model, plan)), tuple(costs), refused)


def _cost(name: str, plan: Plan, quantized: bool = True) -> Cost:
    """The cost of a plan, or of the unquantized model in the dtype that it is stored in.

    Times one of the plan's linears on this machine's CPU.
    """
    wiring, size, bits = plan.wiring, plan.stored_dtype.itemsize, plan.recipe.activations.bits
    rows, columns = wiring.tensors[f"{plan.parts.embedding}.weight"].shape
    nbytes = plan.total_bytes if quantized else wiring.nbytes
    embedding = rows * (columns + 2 if quantized and plan.tables else columns * size)
    unread_experts = sum(
        (1 - _share(plan, site)) * (site.stored_bits / 8 if quantized else size * site.elements)
        for site in plan.sites
    )
    read = nbytes - unread_experts - (0 if wiring.tied else embedding)
    linears = 2.0 * PROMPT * sum(_share(plan, site) * site.elements for site in plan.sites)
    emulated = quantized and plan.recipe.activations.is_float
    floats = not quantized or bits == FLOAT_BITS or emulated
    integers = "int8" if bits == 8 else f"int8 ({bits}-bit codes)"
    products = FLOAT_PRODUCTS if floats else integers
    widest = max(plan.sites, key=lambda site: site.input.width)
    return Cost(
        name=name,
        weight=plan.bits.weight if quantized else 8.0 * size,
        activation=plan.bits.activation if quantized else 8.0 * size,
        nbytes=nbytes,
        read=int(read),
        products=f"{products} (emulated)" if emulated else products,
        decode={chip.name: chip.bandwidth / read for chip in CHIPS},
        prompt={c.name: linears / (c.bfloat16 if floats else c.int8) for c in CHIPS},
        here=_timed(widest) if quantized else (1.0, 1.0),
    )


def _share(plan: Plan, site: SitePlan) -> float:
    """Share of a site's weights that one token is multiplied with: below 1 for routed experts."""
    if not site.site.routed:
        return 1.0
    config = plan.wiring.config
    experts = next(getattr(config, name) for name in EXPERT_COUNTS if hasattr(config, name))
    share: float = min(1.0, (getattr(config, "num_experts_per_tok", None) or 2) / experts)
    return share


def _timed(site: SitePlan) -> tuple[float, float]:
    """Speedup over float32 of a site's first linear on this CPU, with 1 and with PROMPT tokens.

    The linear has random weights, and as many outputs as TIMED_WEIGHTS lets it.
    """
    spec = next(iter(site.modules.values()))
    width, grid = spec.in_features, spec.grid.unclipped()
    rows = min(spec.out_features, max(1, TIMED_WEIGHTS // width))
    weight = torch.randn(rows, width, dtype=torch.float32)
    site_input = InputQuantizer("timed", site.input)
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
    """Median seconds of `slow` over those of `fast`; the two run in turns."""
    begun = time.perf_counter()
    spent: dict[Callable[[], object], list[float]] = {slow: [], fast: []}
    for turn in range(REPETITIONS + 1):
        for call, times in spent.items():
            start = time.perf_counter()
            call()
            if turn:  # the first compiles and fills caches
                times.append(time.perf_counter() - start)
        if turn and time.perf_counter() - begun > TIMED_SECONDS:
            break
    return statistics.median(spent[slow]) / statistics.median(spent[fast])


def tables(advice: PlanAdvice) -> list[Table]:
    """The tables that `smoothq plan` prints: runners, costs, bounds, and what is refused."""
    runners = [(r.name, "yes" if r.runs else "no", r.how) for r in advice.runners]
    costs = [
        (
            cost.name,
            *(f"{value:.2f}" for value in (cost.weight, cost.activation)),
            *(f"{value / 1e9:.2f}" for value in (cost.nbytes, cost.read)),
            cost.products,
            *(f"{value:.1f}" for value in cost.here),
        )
        for cost in advice.costs
    ]
    bounds = [
        (
            cost.name,
            *(
                text
                for chip in cost.decode
                for text in (f"{cost.decode[chip]:.0f}", f"{1e3 * cost.prompt[chip]:.2f}")
            ),
        )
        for cost in advice.costs
    ]
    printed = [
        columns("Who can run it", ("", "runs", "by"), runners),
        columns(
            "What it costs beside the alternatives; speed of the widest linear measured on this "
            "processor, times float32",
            ("", "bits", "inputs", "GB", "GB a token", "products in", "1 token", f"{PROMPT}"),
            costs,
        ),
        columns(
            "Bounds computed from data sheets, batch 1: tokens decoded a second at most, ms of "
            f"the products of a prompt of {PROMPT} tokens at least",
            ("", *(f"{chip.name}, {what}" for chip in CHIPS for what in ("tokens/s", "ms"))),
            bounds,
        ),
    ]
    if advice.refused:
        title = "What this model cannot take"
        printed.append(columns(title, ("", "because"), list(advice.refused.items())))
    return printed
