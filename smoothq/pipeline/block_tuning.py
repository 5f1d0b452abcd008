"""Block-wise tuning: codes and scales of a whole block learned jointly on the block's output.

GPTQ rounds each matrix to minimise the error of that matrix's output. Here all matrices of a
block, already rounded, are tuned together, so that the block's output on the quantized hidden
states approaches the float block's output on the float ones. Gradient steps are taken on the value
that each code was rounded from, with a straight-through estimator for the rounding, and on every
scale. The block's number formats do not change, so inference costs the same. Sources: BRECQ
(arXiv 2102.05426) for the block's output as the target, LSQ (arXiv 1902.08153) for the gradient of
a scale, AutoRound (arXiv 2309.05516) for learning rates in units of codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..kernels.reference import by_group, nonzero
from ..modules import InputQuantizer, QuantizedLinear
from ..plan.plan import BlockPlan
from ..recipe.recipe import Tuning
from ..rounding.grid import Grid, QuantizedWeight, Scales
from ..runtime.memory import busy_heap
from ..transforms.hadamard import Hadamard
from .hidden_states import HiddenStates

WARM_UP = 5  # steps over which the learning rate rises
NOISE = 1e-12  # share of the largest ‖y‖² below which a token's output counts as zero
EDGE = 0.499  # largest initial |position − code|, so that every position rounds to its code


def tune(
    block: nn.Module,
    index: int,
    plan: BlockPlan,
    unrounded: dict[str, Tensor],
    stream: HiddenStates,
    target: HiddenStates,
    settings: Tuning,
) -> None:
    """Tune the codes and scales of a quantized block, in place; deterministic for equal inputs.

    Args:
        block: the block, with QuantizedLinears in place of its linears.
        index: its number in the model.
        plan: its plan.
        unrounded: module name → float (N, K), the values that its codes were rounded from.
        stream: the quantized hidden states that enter the block.
        target: the float hidden states that the block's output should match.
        settings: steps and learning rates.

    Raises:
        NumericsError: the loss is NaN or Inf; the message names the layer.
    """
    inputs, linears = _tunable(block, plan, unrounded)
    if not linears:
        return
    block.requires_grad_(False)
    for module, linear in linears.items():
        block.set_submodule(module, linear)
    groups: list[dict[str, Any]] = [
        {"params": [linear.position for linear in linears.values()], "lr": settings.code_rate},
        {"params": [linear.gain for linear in linears.values()], "lr": settings.scale_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / settings.steps),
    )
    generator = torch.Generator().manual_seed(index)
    turns, order = stream.turns(), list[int]()
    with torch.enable_grad(), busy_heap():
        for _ in range(settings.steps):
            if not order:
                order = torch.randperm(len(turns), generator=generator, device="cpu").tolist()
            for batch, share in turns[order.pop()]:
                output = stream.forward(block, index, batch)
                loss = share * relative_error(output, target.batch(batch))
                if not torch.isfinite(loss):
                    raise NumericsError(f"layer {index}: the loss of tuning is {loss.item()}")
                loss.backward()
                for shared in inputs.values():
                    shared.forget()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for module, linear in linears.items():
        block.set_submodule(module, linear.finish())


def _tunable(
    block: nn.Module, plan: BlockPlan, unrounded: dict[str, Tensor]
) -> tuple[dict[str, _Input], dict[str, _Linear]]:
    """A block's inputs by name, and the linears that read them by module, as they are tuned."""
    inputs: dict[str, _Input] = {}
    linears: dict[str, _Linear] = {}
    for site in plan.sites:
        for module in site.modules:
            linear = block.get_submodule(module)
            assert isinstance(linear, QuantizedLinear)
            shared = inputs.setdefault(site.input_name, _Input(linear.site_input))
            linears[module] = _Linear(linear, shared, unrounded[module])
    return inputs, linears


def relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖y − ŷ‖² / ‖y‖², float ().

    A plain squared error would be dominated by the few tokens with massive activations. A token
    whose y is zero, such as that of a padding row of the embedding, contributes zero.

    Args:
        output: ŷ, float (..., K).
        wanted: y, float (..., K).
    """
    return relative((output - wanted).square().sum(-1), wanted.square().sum(-1)).mean()


def relative(error: Tensor, size: Tensor) -> Tensor:
    """error / size for each token; zero for a token whose size is zero up to rounding errors.

    Args:
        error: ‖y − ŷ‖² of each token, float.
        size: ‖y‖² of each token, the same shape.
    """
    nothing = size <= NOISE * size.max()
    return error / size.masked_fill(nothing, torch.inf)


class _Rotate(torch.autograd.Function):
    """x R, with the gradient g Rᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Hadamard) -> Tensor:
        ctx.rotation = rotation
        return rotation.apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.rotation.apply_transposed(gradients[0]), None


def _rotate(x: Tensor, rotation: Hadamard) -> Tensor:
    rotated: Tensor = _Rotate.apply(x, rotation)  # type: ignore[no-untyped-call]
    return rotated


class _Input(nn.Module):
    """A site's rotated and quantized input, with a straight-through gradient.

    The result is cached, as several linears read the same tensor.
    """

    def __init__(self, site_input: InputQuantizer) -> None:
        super().__init__()
        self._site_input = site_input
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            rotation = self._site_input.spec.rotation
            rotated = x if rotation is None else _rotate(x, rotation)
            with torch.no_grad():
                moved = self._site_input.dequantized(x) - rotated
            self._last = x, rotated + moved
        return self._last[1]

    def forget(self) -> None:
        """Clear the cache after a backward pass, which has freed its graph."""
        self._last = None


class _Round(torch.autograd.Function):
    """ŵ = v(code − zero) · step · gain, code = round(position) on the grid, v its value.

    position: float (N, K), in codes; gain: (N, 1) or (N, G). The gradient with respect to position
    is that of ŵ times the step, zero where the code is clamped at an end of the grid. Adam
    normalises gradients, so their scale does not matter, nor how far apart the values lie there.
    """

    @staticmethod
    def forward(ctx: Any, position: Tensor, gain: Tensor, scales: Scales, grid: Grid) -> Tensor:
        codes, step, zero = _codes(position, grid), scales.step(torch.float32), scales.zero
        if zero is not None:
            codes.unflatten(-1, (zero.shape[1], -1)).sub_(zero.unsqueeze(-1))
        scaled = by_group(grid.values(codes), step)
        ctx.save_for_backward(position, gain, step, scaled)
        ctx.grid = grid
        weight: Tensor = by_group(scaled, gain)
        return weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        position, gain, step, scaled = ctx.saved_tensors
        gradient, grid = gradients[0], ctx.grid
        free = (position > grid.lowest - 0.5) & (position < grid.highest + 0.5)
        of_position = by_group(gradient, step).mul_(free)
        of_gain = (gradient * scaled).unflatten(-1, (gain.shape[1], -1)).sum(-1)
        return of_position, of_gain, None, None


def _round(position: Tensor, gain: Tensor, scales: Scales, grid: Grid) -> Tensor:
    weight: Tensor = _Round.apply(position, gain, scales, grid)  # type: ignore[no-untyped-call]
    return weight


def _codes(position: Tensor, grid: Grid) -> Tensor:
    return position.round().clamp_(grid.lowest, grid.highest)


class _Linear(nn.Module):
    """A QuantizedLinear whose codes and scales can be learned.

    position: float32 (N, K), the values that the codes are rounded from, in units of codes. gain:
    float32, shaped as the stored scales, which are multiplied by it at the end.
    """

    def __init__(self, linear: QuantizedLinear, shared: _Input, unrounded: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "_quantized", linear)
        object.__setattr__(self, "_shared", shared)
        weight = linear.quantized_weight()
        self._scales, self._grid = weight.scales, linear.spec.grid
        codes = weight.codes.float()
        step = self._scales.step(torch.float32)
        position = self._grid.positions(by_group(unrounded.float(), 1 / nonzero(step)))
        zero = self._scales.zero_by_column(codes.shape[1], codes.dtype)
        if zero is not None:
            position += zero
        self.position = nn.Parameter(position.clamp_(codes - EDGE, codes + EDGE))
        ones = torch.ones_like(self._scales.scale, dtype=torch.float32)
        self.gain = nn.Parameter(ones, requires_grad=self._grid.learns_scales)

    _quantized: QuantizedLinear
    _shared: _Input

    def forward(self, x: Tensor) -> Tensor:
        weight = _round(self.position, self.gain, self._scales, self._grid)
        return nn.functional.linear(self._shared(x), weight, self._quantized.bias)

    @torch.no_grad()
    def finish(self) -> QuantizedLinear:
        """The original QuantizedLinear with the learned codes and scales."""
        codes = _codes(self.position, self._grid)
        stored = self._scales.scale
        scales = replace(self._scales, scale=(stored.float() * self.gain).to(stored.dtype))
        learned = QuantizedWeight(codes.to(torch.int8), scales, element=self._grid.element)
        self._quantized.set_weight(learned, None)
        return self._quantized
