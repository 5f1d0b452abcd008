"""GPTQ: round column by column, and compensate the error of each column in the later ones.

With H = Σ x xᵀ over the calibration tokens, and U the upper Cholesky factor of H⁻¹: column j is
rounded, and its error (w_j − ŵ_j) / U_jj times U_jk is subtracted from each later column k. Scales
are computed once, from the weights before any compensation (static groups), so that columns can be
visited in any order. Source: arXiv 2210.17323, algorithm 1; the order by activation is that of its
released code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError
from ..recipe.recipe import Gptq
from .grid import Grid, QuantizedWeight, Scales

log = logging.getLogger("smoothq")

WORK_ELEMENTS = 1 << 23  # weights that are rounded at a time: 64 MB in float64
LARGEST_DAMPING = 10.0  # more would drown H: ten times its mean diagonal


def inverse_factor(hessian: Tensor, damping: float, where: str) -> Tensor:
    """The upper Cholesky factor U of (H + λI)⁻¹ = Uᵀ U, λ = damping · mean(diag H).

    Where the factorisation fails, λ is multiplied by ten and a warning is logged.

    Args:
        hessian: H, float64 (K, K), symmetric, with a positive diagonal.
        damping: as a share of the mean diagonal of H.
        where: the site, for messages.

    Raises:
        NumericsError: the factorisation fails up to LARGEST_DAMPING.
    """
    return _inverse_factor(lambda: hessian.flip(0, 1), damping, where)


def _inverse_factor(reversed_hessian: Callable[[], Tensor], damping: float, where: str) -> Tensor:
    """`inverse_factor` of the Hessian that a function returns with rows and columns reversed.

    With J the reversal and J H J = L Lᵀ, H is R Rᵀ for the upper R = J L J; so U = R⁻¹ = J L⁻¹ J:
    one factorisation and one triangular inverse, with at most two matrices in memory.
    """
    while damping <= LARGEST_DAMPING:
        hessian = reversed_hessian()
        hessian.diagonal().add_(damping * hessian.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(hessian)
        del hessian
        if not failed:
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            if not torch.isfinite(lower.diagonal() + inverse.diagonal()).all():
                break
            del lower
            return inverse.flip(0, 1)
        damping *= 10
        if damping <= LARGEST_DAMPING:
            message = "%s: the Hessian is not positive definite; damping raised to %g"
            log.warning(message, where, damping)
    raise NumericsError(f"{where}: the Hessian has no Cholesky factor, whatever the damping")


@dataclass(frozen=True)
class Factor:
    """A factorised Hessian: computed once a token group of a site, used for every reader.

    A token group is the modules of a site that the same tokens reach.

    Attributes:
        upper: U, float64 (K, K), of the columns in visiting order.
        order: int64 (K,), the columns in visiting order.
        dead: bool (K,), the channels that are zero in all calibration tokens.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor


def factorise(hessian: Tensor, settings: Gptq, where: str) -> Factor:
    """Factorise a Hessian for `gptq`.

    Args:
        hessian: H = Σ x xᵀ, float (K, K).
        settings: damping, and whether columns are visited by activation.
        where: the site, for messages.

    Raises:
        NumericsError: H has no Cholesky factor, with any damping.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    order = torch.arange(len(hessian), device=hessian.device)
    if settings.activation_order:
        # A dead channel counts as 1, as on the diagonal below.
        order = torch.where(dead, 1.0, diagonal).argsort(descending=True, stable=True)
    backwards = order.flip(0)

    def permuted() -> Tensor:
        rows = hessian.double()[backwards]
        both: Tensor = rows[:, backwards]
        both.diagonal()[dead[backwards]] = 1
        return both

    return Factor(_inverse_factor(permuted, settings.damping, where), order, dead)


def gptq(
    weight: Tensor, factor: Factor, grid: Grid, block_size: int, largest: float | None = None
) -> QuantizedWeight:
    """Codes and scales of a matrix, rounded to minimise the error of its output.

    Args:
        weight: float (N, K). Dead channels are rounded to zero.
        factor: of the Hessian of the matrix's inputs.
        grid: of the codes.
        block_size: columns that are rounded before all later ones are updated.
        largest: as of `Grid.find_scales`.
    """
    weight = torch.where(factor.dead, 0, weight).float()
    scales = grid.find_scales(weight, largest)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    unrounded = torch.empty_like(weight)
    count = max(1, WORK_ELEMENTS // weight.shape[1])
    # Rows are independent: some at a time take little memory.
    for rows in (slice(i, i + count) for i in range(0, len(weight), count)):
        lattice = scales.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
        codes[rows], unrounded[rows] = _round_rows(weight[rows], lattice, factor, grid, block_size)
    return QuantizedWeight(codes, scales, unrounded, grid.element)


def _round_rows(
    weight: Tensor, scales: Scales, factor: Factor, grid: Grid, block_size: int
) -> tuple[Tensor, Tensor]:
    """Codes of some rows, and the compensated weights before rounding: float64 (n, K)."""
    order, upper = factor.order, factor.upper
    columns = weight.shape[1]
    step = scales.step_by_column(columns, torch.float64)[:, order]
    zero = scales.zero_by_column(columns, torch.float64)
    zero = None if zero is None else zero[:, order]
    weight = weight.double()[:, order]
    codes, unrounded = torch.empty_like(weight), torch.empty_like(weight)
    for first in range(0, weight.shape[1], block_size):
        block = slice(first, min(first + block_size, weight.shape[1]))
        codes[:, block], unrounded[:, block], error = _round_block(
            weight[:, block],
            step[:, block],
            None if zero is None else zero[:, block],
            upper[block, block],
            grid,
        )
        weight[:, block.stop :] -= error @ upper[block, block.stop :]
    back = order.argsort()
    return codes[:, back], unrounded[:, back]


def _round_block(
    weight: Tensor, step: Tensor, zero: Tensor | None, factor: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a block of columns, the weights before rounding, and the errors over U_jj."""
    columns, steps = weight.t().contiguous(), step.t().contiguous()
    zeros = None if zero is None else zero.t().contiguous()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j in range(len(columns)):
        at = None if zeros is None else zeros[j]
        codes[j] = grid.codes(columns[j], steps[j], at)
        values = grid.values(codes[j] if at is None else codes[j] - at)
        errors[j] = (columns[j] - values * steps[j]) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return codes.t(), columns.t(), errors.t()
