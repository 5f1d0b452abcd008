"""Time, memory and disk space that a quantization will take, estimated before it starts.

Memory is the sum of one block in float and quantized form, the statistics of one site, and the
hidden states of the calibration tokens, which are stored on disk if they exceed the limit. Large
stacks of experts lie in files while their block is quantized, in both forms: of them one matrix
counts as memory, and all as disk. Time is
spent in matrix products: calibration forwards, Hessians and their factorisation, GPTQ's updates,
the steps of tuning. They are counted as float32 operations and divided by the measured speed at
which the device multiplies matrices of the model's size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ..architectures.linearize import SeparateExperts
from ..checkpoint.shards import SHARD_BYTES
from ..checkpoint.source import is_large_stack
from ..data.tokens import MICRO_BATCH_TOKENS
from ..errors import RecipeError
from ..modules import WeightSpec
from ..plan.plan import BlockPlan, Plan
from ..report.results import ResourceEstimate, TimeEstimate
from ..rounding.gptq import WORK_ELEMENTS
from ..runtime.mapped import RESIDENT_BYTES
from ..runtime.memory import peak_memory
from .quantize_block import HESSIAN_BYTES

# Costs in float32 operations that take as long, fitted on two CPU cores.
OPS_PER_FLOAT64_OP = 2
OPS_PER_WEIGHT = 1500.0  # reading, folding, rounding and writing one weight
OPS_PER_TRIED_SCALE = 250.0  # rounding one weight with one more candidate scale

OVERHEAD = 1.4  # total time / time of the counted operations, on SmolLM2-135M
PROBE_SECONDS = 0.2  # for which the speed of the device is measured
PROBE_OPERATIONS = 1 << 33  # of one product in it, at most: a wide model's would take seconds
ROUTED_EXPERTS = 2.0  # that one token is assumed to pass through, per layer
STATES_BYTES = 1 << 30  # of hidden states in memory; larger ones are stored on disk
CHUNK_BYTES = 256 << 20  # temporaries of operations that process a matrix in chunks
TUNING_BYTES = 32  # per weight of a tuned block: weights, gradients, moments, saved products


def estimate_time(plan: Plan, device: torch.device) -> TimeEstimate:
    """The estimated time of a quantization.

    Measures the speed of the device for a fraction of a second.

    Args:
        plan: the plan to carry out.
        device: where the blocks are quantized.
    """
    operations = sum(
        block_operations(block, plan) + _handling_operations(block) for block in plan.blocks
    )
    return TimeEstimate(operations, OVERHEAD * operations / _speed(plan, device))


def _handling_operations(block: BlockPlan) -> float:
    """Reading, folding, rounding and writing a block, in float32 operations that take as long."""
    total = 0.0
    for spec in block.weight_specs:
        total += spec.elements * (OPS_PER_WEIGHT + OPS_PER_TRIED_SCALE * spec.grid.tried_scales)
    return total


def block_operations(block: BlockPlan, plan: Plan) -> float:
    """Float32 operations of the matrix products that quantizing one block takes.

    A forward consists of the linears and the attention; a token is assumed to pass through two
    experts. Calibrating a site takes a forward up to it. Smoothing takes one whole forward, as does
    computing the next block's input. Tuning takes a forward of the float block, and as much as
    three forwards per step.
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
        elements = sum(site.elements for site in sites)
        token_groups = sum(len(site.site.token_groups) for site in sites)
        passed = min(1.0, ROUTED_EXPERTS / token_groups)
        if recipe.weights.rounding == "gptq":
            total += tokens * (forward + passed * token_groups * 2 * width**2)
            total += OPS_PER_FLOAT64_OP * (token_groups * 2 * width**3 + elements * width)
        elif sites[0].input.calibrated:
            total += tokens * forward
        forward += passed * 2.0 * elements
    total += tokens * forward * (1 + (recipe.smoothing is not None))
    if recipe.tuning is not None:
        total += tokens * forward + 3 * forward * MICRO_BATCH_TOKENS * recipe.tuning.steps
    return total


def _speed(plan: Plan, device: torch.device) -> float:
    """Measured float32 operations per second in products of the model's size, with all threads."""
    spec = max((spec for _, spec, _ in plan.linears()), key=lambda spec: spec.elements)
    floats: Any = {"dtype": torch.float32, "device": device}
    tokens = min(MICRO_BATCH_TOKENS, max(64, PROBE_OPERATIONS // (2 * spec.elements)))
    x = torch.rand(tokens, spec.in_features, **floats)
    weight = torch.rand(spec.in_features, spec.out_features, **floats)
    (x @ weight)[0, 0].item()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < PROBE_SECONDS:
        (x @ weight)[0, 0].item()  # waits for the device
        products += 1
    return products * 2 * x.numel() * spec.out_features / (time.perf_counter() - start)


def estimate_resources(
    plan: Plan,
    max_memory: int | None = None,
    every: int = 1,
    tokens: int | None = None,
    towers: bool = False,
) -> ResourceEstimate:
    """The estimated peak memory and disk space of a quantization, in bytes.

    Args:
        plan: the plan to carry out.
        max_memory: bytes that the process may use; None for no limit on the process and 1 GiB of
            hidden states in memory.
        every: number of blocks between two saved states to resume from.
        tokens: number of calibration tokens; None for the number that the recipe asks for.
        towers: whether calibration has images or sound, for which towers are loaded in float32.

    Raises:
        RecipeError: `max_memory` is too little even with the hidden states on disk.
    """
    recipe = plan.recipe
    text, streams = recipe.calibration, 1 + (recipe.tuning is not None)
    if tokens is None:
        tokens = text.samples * text.sequence_length if recipe.calibrates else 0
    width = plan.wiring.config.hidden_size
    states = 4 * streams * tokens * width
    blocks = [_working_bytes(plan, index) for index in range(len(plan.blocks))]
    work = max(block.memory for block in blocks)
    work = peak_memory() + max(work, 4 * plan.wiring.tower_elements if towers else 0)
    limit = STATES_BYTES if max_memory is None else max_memory - work
    on_disk = states > limit
    least = work + 8 * MICRO_BATCH_TOKENS * width * streams
    if max_memory is not None and least > max_memory:
        raise RecipeError(
            f"a max_memory of {max_memory / 1e9:.2f} GB is too little: this recipe takes "
            f"{least / 1e9:.2f} GB with its hidden states on the disk"
        )
    kept = 2 * states if every <= len(plan.blocks) else 0
    disk = plan.total_bytes + min(SHARD_BYTES, plan.total_bytes) + kept
    disk += max(block.files for block in blocks)
    return ResourceEstimate(
        least if on_disk else work + states, disk + 2 * states * on_disk, on_disk
    )


class _WorkingBytes(NamedTuple):
    """What quantizing one block takes at its peak. files: of the experts that lie in some."""

    memory: int
    files: int


def _working_bytes(plan: Plan, index: int) -> _WorkingBytes:
    """Peak bytes for quantizing one block, without the hidden states."""
    recipe, block, lists = plan.recipe, plan.blocks[index], _lists_in_files(plan, index)
    named = [item for site in block.sites for item in site.modules.items()]
    in_files = [spec for name, spec in named if _in_list(name, lists)]
    in_memory = [spec for name, spec in named if not _in_list(name, lists)]
    all_elements = sum(spec.elements for _, spec in named) + block.kept_elements
    elements = all_elements - sum(lists.values())
    codes = sum(spec.elements * spec.grid.bits // 8 for spec in in_files)
    most = 4 * elements + plan.stored_dtype.itemsize * _widest(in_memory)
    resident = sum(spec.stored_bits // 8 for spec in in_files) - codes  # scales, of all experts
    if lists:
        resident += RESIDENT_BYTES + 4 * _widest(in_files)
    if recipe.tuning is not None:
        most = max(most, TUNING_BYTES * all_elements)
    if recipe.weights.rounding == "gptq":
        waiting = 4 * elements  # bytes of weights: 4 before they are rounded, under 2 after
        for _, together in groupby(block.sites, key=lambda site: site.site.stage):
            sites = list(together)
            squares = [8 * s.input.width**2 for s in sites for _ in s.site.token_groups]
            square = max(squares)
            moments = max(square, min(sum(squares), HESSIAN_BYTES))
            modules = [item for site in sites for item in site.modules.items()]
            weights = sum(spec.elements for name, spec in modules if not _in_list(name, lists))
            worked_on = max(weights, _widest(spec for name, spec in modules))
            work = 6 * 8 * min(WORK_ELEMENTS, worked_on) + 9 * worked_on
            most = max(most, waiting + moments + max(2 * square, work))
            waiting -= 2 * weights
    if recipe.calibrates:
        rows = max((spec.out_features for _, spec in named), default=0)
        most += 4 * 4 * MICRO_BATCH_TOKENS * rows  # activations of a forward that are alive at once
    return _WorkingBytes(most + resident + CHUNK_BYTES, 4 * sum(lists.values()) + codes)


def _lists_in_files(plan: Plan, index: int) -> dict[str, int]:
    """The lists of a block's experts that lie in files: name within the block → weights."""
    layer, block = plan.wiring.layers[index], plan.parts.block_name(index)
    lists = {}
    for path, module in layer.named_modules():
        if isinstance(module, SeparateExperts):
            for stack, linears in module.views.items():
                spec = plan.wiring.tensors.get(f"{block}.{path}.{stack}")
                if spec is not None and is_large_stack(spec):
                    lists[f"{path}.{linears}"] = spec.elements
    return lists


def _in_list(module: str, lists: dict[str, int]) -> bool:
    return module.rpartition(".")[0] in lists


def _widest(specs: Iterable[WeightSpec]) -> int:
    return max((spec.elements for spec in specs), default=0)
