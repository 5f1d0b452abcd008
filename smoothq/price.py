"""What a quantization will take, before it is begun: counted from shapes, timed by a few products.

Everything that takes long is matrix products: calibration forwards, Hessians and their
factorisation, GPTQ's updates, the steps of tuning. They are counted as float32 operations and
divided by the speed at which this device multiplies matrices of the model's own size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import groupby

import torch

from .hidden_states import MICRO_BATCH_TOKENS
from .plan import BlockPlan, Plan

DOUBLE = 2  # a float64 operation in float32 ones
OVERHEAD = 1.4  # all that is no product, as a share: measured on SmolLM2-135M on two cores
PROBE_SECONDS = 0.2
ROUTED = 2.0  # experts that a token is taken to pass


@dataclass(frozen=True)
class Price:
    """operations: float32 ones, a product of (M, K) and (K, N) being 2 MKN. seconds: estimated."""

    operations: float
    seconds: float


def price(plan: Plan, device: torch.device) -> Price:
    """The estimate for a plan whose blocks will be worked on on a device."""
    operations = sum(block_operations(block, plan) for block in plan.blocks)
    return Price(operations, OVERHEAD * operations / _speed(plan, device))


def block_operations(block: BlockPlan, plan: Plan) -> float:
    """Operations that one block takes.

    A forward is counted by its linears and its attention; of the experts it is taken to pass two.
    Each site is reached by a forward up to it; smoothing and moving on take one more each, tuning a
    forward of the float block and three forwards' work a step.
    """
    recipe = plan.recipe
    length = recipe.calibration.sequence_length
    tokens = recipe.calibration.samples * length if recipe.calibrates else 0
    forward, total = 0.0, 0.0  # operations a token of the block so far; operations
    for _, together in groupby(block.sites, key=lambda site: site.site.stage):
        sites = list(together)
        width = sites[0].input.width
        if sites[0].site is block.graph.value_output:
            forward += 4.0 * length * width
        specs = [spec for site in sites for spec in site.modules.values()]
        elements = sum(spec.out_features * spec.in_features for spec in specs)
        lanes = sum(len(site.site.lanes) for site in sites)
        passed = min(1.0, ROUTED / lanes)
        if recipe.weights.rounding == "gptq":
            total += tokens * (forward + passed * lanes * 2 * width**2)
            total += DOUBLE * (lanes * 2 * width**3 + elements * width)
        elif sites[0].input.mode in ("static", "calibrated"):
            total += tokens * forward
        forward += passed * 2.0 * elements
    total += tokens * forward * (1 + (recipe.smoothing is not None))
    if recipe.tuning is not None:
        total += tokens * forward + 3 * forward * MICRO_BATCH_TOKENS * recipe.tuning.steps
    return total


def _speed(plan: Plan, device: torch.device) -> float:
    """Float32 operations a second of products of the model's size, with all threads."""
    spec = max(
        (spec for b in plan.blocks for site in b.sites for spec in site.modules.values()),
        key=lambda spec: spec.out_features * spec.in_features,
    )
    x = torch.rand(MICRO_BATCH_TOKENS, spec.in_features, device=device)
    weight = torch.rand(spec.in_features, spec.out_features, device=device)
    (x @ weight)[0, 0].item()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        (x @ weight)[0, 0].item()  # waits for the device
        products += 1
    return products * 2 * x.numel() * spec.out_features / (time.perf_counter() - start)


def as_text(seconds: float) -> str:
    """A duration as one would say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
