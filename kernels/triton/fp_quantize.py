"""fp_quantize: one program a token, the whole token in registers, every byte touched once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Scaling, fp_tensor_scale
from .fp_codes import fp_values
from .launch import cdiv, check_float, next_power_of_2, registered, row_count, row_warps


@triton.jit
def _fp_quantize_kernel(
    x,
    tensor_scale,
    out,
    K,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, COLUMNS)[None, :]
    columns = tl.arange(0, GROUPS)[:, None] * GROUP + inner
    inside = (inner < GROUP) & (columns < K)
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    of_tensor = 1.0 if tensor_scale is None else tl.load(tensor_scale).to(tl.float32)
    tl.store(out + row * K + columns, fp_values(values, of_tensor, ELEMENT, SCALING), mask=inside)


def _empty(x: Tensor, *form: object) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


@registered("fp_quantize", _empty)
def _fp_quantize(
    x: Tensor, element: str, scaling: str, group_size: int, tensor_scale: Tensor | None
) -> Tensor:
    check_float(x, "fp_quantize")
    out, width = _empty(x), x.shape[-1]
    if x.numel():
        group = width if scaling in ("token", "static") else group_size
        tile = next_power_of_2(cdiv(width, group)), next_power_of_2(group)
        warps = row_warps(tile[0] * tile[1], x.get_device())
        form = (width, group, element, scaling, *tile)
        kernel = _fp_quantize_kernel[(row_count(x),)]
        kernel(x.contiguous(), tensor_scale, out, *form, num_warps=warps)
    return out


def fp_quantize(
    x: Tensor,
    element: str,
    scaling: Scaling,
    group_size: int = 0,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """As `reference.fp_quantize`; the maximum of a whole tensor is PyTorch's."""
    if scaling == "tensor":
        check_float(x, "fp_quantize")
        scaling, tensor_scale = "static", fp_tensor_scale(x.float(), element)
    elif scaling not in ("static", "e4m3"):
        tensor_scale = None
    return _fp_quantize(x, element, scaling, group_size, tensor_scale)
