"""GPTQ: round column by column, and let later columns make up for the error of earlier ones.

With H = Σ x xᵀ over the tokens that the layer will see, and U the upper Cholesky factor of H⁻¹:
column j is rounded, and its error (w_j − ŵ_j) / U_jj is taken from each later column k in
proportion to U_jk. Scales are found once, from the weights as they are (static groups), so that
columns may be visited in any order. Source: arXiv 2210.17323, algorithm 1; the order by
activation is that of its released code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError
from ..recipe import Gptq
from .grid import IntegerGrid, QuantizedWeight

log = logging.getLogger("smoothq")

LARGEST_DAMPING = 10.0  # beyond ten times the mean diagonal nothing of H is left


def inverse_factor(hessian: Tensor, damping: float, where: str) -> Tensor:
    """The upper Cholesky factor U of (H + λI)⁻¹ = Uᵀ U, λ = damping · mean(diag H).

    hessian: float64 (K, K), symmetric, with a positive diagonal. Where the factorisation fails λ
    grows tenfold, and the log says so for `where`. Raises NumericsError when it keeps failing.
    """
    mean = hessian.diagonal().mean()
    while damping <= LARGEST_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
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
    hessian = hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    order = torch.arange(len(hessian), device=hessian.device)
    if settings.activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(hessian[order][:, order], settings.damping, where)
    return Factor(upper, order, dead)


def gptq(weight: Tensor, factor: Factor, grid: IntegerGrid, block_size: int) -> QuantizedWeight:
    """Codes and scales of a matrix that minimise the error of its output, not of its entries.

    weight: float (N, K). Channels that no token reaches are rounded to zero.
    """
    weight = weight.double().clone()
    weight[:, factor.dead] = 0
    scales = grid.find_scales(weight)
    order, upper = factor.order, factor.upper
    step = scales.step_by_column(weight.shape[1], torch.float64)[:, order]
    weight = weight[:, order]
    codes, unrounded = torch.empty_like(weight), torch.empty_like(weight)
    for first in range(0, weight.shape[1], block_size):
        block = slice(first, min(first + block_size, weight.shape[1]))
        codes[:, block], unrounded[:, block], error = _round_block(
            weight[:, block], step[:, block], upper[block, block], grid
        )
        weight[:, block.stop :] -= error @ upper[block, block.stop :]
    back = order.argsort()
    return QuantizedWeight(codes[:, back].to(torch.int8), scales, unrounded[:, back].float())


def _round_block(
    weight: Tensor, step: Tensor, factor: Tensor, grid: IntegerGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a block of columns, what they were rounded from, and the errors over U_jj."""
    columns, steps = weight.t().contiguous(), step.t().contiguous()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j in range(len(columns)):
        codes[j] = grid.codes(columns[j], steps[j])
        errors[j] = (columns[j] - codes[j] * steps[j]) / factor[j, j]
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return codes.t(), columns.t(), errors.t()
