"""What a quantization will take, before it is begun: counted from shapes, timed by a few products.

Memory is one block with what is made of it, the statistics of one site, and the calibration's
hidden states, which go to the disk where they would be too much. What takes long is matrix
products: calibration forwards, Hessians and their factorisation, GPTQ's updates, the steps of
tuning. They are counted as float32 operations and divided by the speed at which this device
multiplies matrices of the model's own size.
"""

from __future__ import annotations

import time
from itertools import groupby
from typing import Any

import torch

from ..checkpoint.shards import SHARD_BYTES
from ..data.tokens import MICRO_BATCH_TOKENS
from ..errors import RecipeError
from ..kernels import largest_multiplier
from ..plan.plan import BlockPlan, Plan
from ..report.results import ResourceEstimate, TimeEstimate
from ..rounding.gptq import WORK_ELEMENTS
from ..rounding.grid import CLIP_RATIOS
from ..runtime.memory import peak_memory

DOUBLE = 2  # a float64 operation in float32 ones
HANDLED = 1500.0  # operations that go by while one weight is read, folded, rounded and written
TRIED = 250.0  # and while one scale is tried for it; measured on two cores, as all here
OVERHEAD = 1.4  # all that is no product, as a share: measured on SmolLM2-135M on two cores
PROBE_SECONDS = 0.2
ROUTED = 2.0  # experts that a token is taken to pass
STATES_BYTES = 1 << 30  # of hidden states; more are held on the disk
STRETCHES_BYTES = 256 << 20  # what works on a matrix by stretches takes beside it
TUNED_BYTES = 32  # an element of a block that is tuned: weights, gradients, moments, saved products


def estimate_time(plan: Plan, device: torch.device) -> TimeEstimate:
    """The estimate for a plan whose blocks will be worked on on a device."""
    operations = sum(
        block_operations(block, plan) + _handling_operations(block) for block in plan.blocks
    )
    return TimeEstimate(operations, OVERHEAD * operations / _speed(plan, device))


def _handling_operations(block: BlockPlan) -> float:
    """What reading, folding, rounding and writing come to, in operations that take as long."""
    total = 0.0
    for spec in (spec for site in block.sites for spec in site.modules.values()):
        tried = 1
        if spec.grid.clip:
            multiplied = spec.grid.multiplier
            tried = largest_multiplier(spec.grid.bits) if multiplied else len(CLIP_RATIOS)
        total += spec.elements * (HANDLED + TRIED * tried)
    return total


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
        elements = sum(spec.elements for spec in specs)
        token_groups = sum(len(site.site.token_groups) for site in sites)
        passed = min(1.0, ROUTED / token_groups)
        if recipe.weights.rounding == "gptq":
            total += tokens * (forward + passed * token_groups * 2 * width**2)
            total += DOUBLE * (token_groups * 2 * width**3 + elements * width)
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
        key=lambda spec: spec.elements,
    )
    floats: Any = {"dtype": torch.float32, "device": device}
    x = torch.rand(MICRO_BATCH_TOKENS, spec.in_features, **floats)
    weight = torch.rand(spec.in_features, spec.out_features, **floats)
    (x @ weight)[0, 0].item()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        (x @ weight)[0, 0].item()  # waits for the device
        products += 1
    return products * 2 * x.numel() * spec.out_features / (time.perf_counter() - start)


def estimate_resources(
    plan: Plan, max_memory: int | None = None, every: int = 1, tokens: int | None = None
) -> ResourceEstimate:
    """What a plan takes of memory and disk. every: blocks between two states that are kept.

    max_memory: bytes that the process may take. tokens: to calibrate on; None for as many as the
    recipe's text. Raises RecipeError where that is too little.
    """
    recipe = plan.recipe
    text, streams = recipe.calibration, 1 + (recipe.tuning is not None)
    if tokens is None:
        tokens = text.samples * text.sequence_length if recipe.calibrates else 0
    sites = [site for block in plan.blocks for site in block.sites]
    stream = [site for site in sites if site.site.reads == "stream"]
    width = max(site.input.width for site in stream or sites)
    states = 4 * streams * tokens * width
    work = peak_memory() + max(_working_bytes(block, plan) for block in plan.blocks)
    limit = STATES_BYTES if max_memory is None else max_memory - work
    on_disk = states > limit
    least = work + 8 * MICRO_BATCH_TOKENS * width * streams
    if max_memory is not None and least > max_memory:
        raise RecipeError(
            f"--max-memory {max_memory / 1e9:.2f} GB is too little: this recipe takes "
            f"{least / 1e9:.2f} GB with its hidden states on the disk"
        )
    kept = 2 * states if every <= len(plan.blocks) else 0
    disk = plan.total_bytes + min(SHARD_BYTES, plan.total_bytes) + kept
    return ResourceEstimate(
        least if on_disk else work + states, disk + 2 * states * on_disk, on_disk
    )


def _working_bytes(block: BlockPlan, plan: Plan) -> int:
    """Bytes that one block takes at most on its way from float to codes."""
    recipe = plan.recipe
    specs = [spec for site in block.sites for spec in site.modules.values()]
    elements = sum(spec.elements for spec in specs) + block.kept_elements
    widest = max((spec.elements for spec in specs), default=0)
    most = 4 * elements + plan.stored_dtype.itemsize * widest
    if recipe.tuning is not None:
        most = max(most, TUNED_BYTES * elements)
    if recipe.weights.rounding == "gptq":
        waiting = 4 * elements  # bytes of weights: 4 before they are rounded, under 2 after
        for _, together in groupby(block.sites, key=lambda site: site.site.stage):
            sites = list(together)
            square = 8 * max(site.input.width for site in sites) ** 2
            here = sum(spec.elements for s in sites for spec in s.modules.values())
            work = 6 * 8 * min(WORK_ELEMENTS, here) + 9 * here
            most = max(most, waiting + max(3 * square, square + work))
            waiting -= 2 * here
    if recipe.calibrates:
        rows = max((spec.out_features for spec in specs), default=0)
        most += 4 * 4 * MICRO_BATCH_TOKENS * rows  # what a forward holds at once
    return most + STRETCHES_BYTES
