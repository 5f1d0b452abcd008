"""GPTQ: round column by column, and let later columns make up for the error of earlier ones.

With H = Σ x xᵀ over the tokens that the layer will see, and U the upper Cholesky factor of H⁻¹:
column j is rounded, and its error (w_j − ŵ_j) / U_jj is taken from each later column k in
proportion to U_jk. Scales are found once, from the weights as they are (static groups), so that
columns may be visited in any order. Source: arXiv 2210.17323, algorithm 1; the order by
activation is that of its released code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError
from ..recipe.recipe import Gptq
from .grid import IntegerGrid, QuantizedWeight, Scales

log = logging.getLogger("smoothq")

WORK_ELEMENTS = 1 << 23  # of a matrix that are worked on at a time: 64 MB in float64
LARGEST_DAMPING = 10.0  # beyond ten times the mean diagonal nothing of H is left


def inverse_factor(hessian: Tensor, damping: float, where: str) -> Tensor:
    """The upper Cholesky factor U of (H + λI)⁻¹ = Uᵀ U, λ = damping · mean(diag H).

    hessian: float64 (K, K), symmetric, with a positive diagonal. Where the factorisation fails λ
    grows tenfold, and the log says so for `where`. Raises NumericsError when it keeps failing.
    """
    return _inverse_factor(lambda: hessian.flip(0, 1), damping, where)


def _inverse_factor(reversed_hessian: Callable[[], Tensor], damping: float, where: str) -> Tensor:
    """`inverse_factor` of a Hessian that is made, rows and columns in reverse, whenever asked for.

    With J the reversal and J H J = L Lᵀ, H is R Rᵀ for the upper R = J L J; so U = R⁻¹ = J L⁻¹ J:
    one factorisation and one triangular inverse, and never more than two matrices.
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
    """What GPTQ needs of a Hessian: computed once a site, used by every reader.

    upper: float64 (K, K), U over the ordered columns. order: int64 (K,), the visiting order.
    dead: bool (K,), channels that no token reaches.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor


def factorise(hessian: Tensor, settings: Gptq, where: str) -> Factor:
    """The inverse factor of H = Σ x xᵀ, float64 (K, K); `where` names the site in messages."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    order = torch.arange(len(hessian), device=hessian.device)
    if settings.activation_order:
        # A dead channel counts as 1: it has to come somewhere.
        order = torch.where(dead, 1.0, diagonal).argsort(descending=True, stable=True)
    backwards = order.flip(0)

    def permuted() -> Tensor:
        rows = hessian.double()[backwards]
        both: Tensor = rows[:, backwards]
        both.diagonal()[dead[backwards]] = 1
        return both

    return Factor(_inverse_factor(permuted, settings.damping, where), order, dead)


def gptq(weight: Tensor, factor: Factor, grid: IntegerGrid, block_size: int) -> QuantizedWeight:
    """Codes and scales of a matrix that minimise the error of its output, not of its entries.

    weight: float (N, K). Channels that no token reaches are rounded to zero.
    """
    weight = torch.where(factor.dead, 0, weight).float()
    scales = grid.find_scales(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    unrounded = torch.empty_like(weight)
    count = max(1, WORK_ELEMENTS // weight.shape[1])
    # Rows know nothing of one another: some at a time, and the work stays small.
    for rows in (slice(i, i + count) for i in range(0, len(weight), count)):
        lattice = scales.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
        codes[rows], unrounded[rows] = _round_rows(weight[rows], lattice, factor, grid, block_size)
    return QuantizedWeight(codes, scales, unrounded)


def _round_rows(
    weight: Tensor, scales: Scales, factor: Factor, grid: IntegerGrid, block_size: int
) -> tuple[Tensor, Tensor]:
    """Codes of some rows, and what they were rounded from: float64 (n, K). scales: the rows'."""
    order, upper = factor.order, factor.upper
    columns = weight.shape[1]
    step = scales.step_by_column(columns, torch.float64)[:, order]
    zero = scales.zero_by_column(columns, torch.float64)
    zero = step.new_zeros(()).expand_as(step) if zero is None else zero[:, order]
    weight = weight.double()[:, order]
    codes, unrounded = torch.empty_like(weight), torch.empty_like(weight)
    for first in range(0, weight.shape[1], block_size):
        block = slice(first, min(first + block_size, weight.shape[1]))
        codes[:, block], unrounded[:, block], error = _round_block(
            weight[:, block], step[:, block], zero[:, block], upper[block, block], grid
        )
        weight[:, block.stop :] -= error @ upper[block, block.stop :]
    back = order.argsort()
    return codes[:, back], unrounded[:, back]


def _round_block(
    weight: Tensor, step: Tensor, zero: Tensor, factor: Tensor, grid: IntegerGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a block of columns, what they were rounded from, and the errors over U_jj."""
    columns, steps, zeros = (matrix.t().contiguous() for matrix in (weight, step, zero))
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j in range(len(columns)):
        codes[j] = grid.codes(columns[j], steps[j], zeros[j])
        errors[j] = (columns[j] - (codes[j] - zeros[j]) * steps[j]) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return codes.t(), columns.t(), errors.t()
