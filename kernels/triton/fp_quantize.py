"""fp_quantize: one program a token, the whole token in registers, every byte touched once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import QuantizedInput, Scaling, fp_tensor_scale
from .fp_codes import e4m3_codes, fp_values, rounded_and_scale
from .launch import cdiv, check_float, next_power_of_2, registered, row_count, row_warps


@triton.jit
def _fp_quantize_kernel(
    x,
    tensor_scale,
    out,
    scales,
    K,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALING: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Values as float32; or, where there are scales to write, E4M3 codes and those."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, COLUMNS)[None, :]
    columns = tl.arange(0, GROUPS)[:, None] * GROUP + inner
    inside = (inner < GROUP) & (columns < K)
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    of_tensor = 1.0 if tensor_scale is None else tl.load(tensor_scale).to(tl.float32)
    pointers = out + row * K + columns
    if scales is None:
        tl.store(pointers, fp_values(values, of_tensor, ELEMENT, SCALING), mask=inside)
    else:
        rounded, scale = rounded_and_scale(values, of_tensor, ELEMENT, SCALING)
        tl.store(pointers, e4m3_codes(rounded), mask=inside)
        group, groups = tl.arange(0, GROUPS), tl.cdiv(K, GROUP)
        tl.store(scales + row * groups + group, scale, mask=group < groups)


def _empty(x: Tensor, *form: object) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


@registered("fp_quantize", _empty)
def _fp_quantize(
    x: Tensor, element: str, scaling: str, group_size: int, tensor_scale: Tensor | None
) -> Tensor:
    check_float(x, "fp_quantize")
    out = _empty(x)
    _launch(x, tensor_scale, out, None, element, scaling, group_size)
    return out


def _launch(
    x: Tensor,
    tensor_scale: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    element: str,
    scaling: str,
    group_size: int,
) -> None:
    width = x.shape[-1]
    if x.numel():
        group = width if scaling in ("token", "static") else group_size
        tile = next_power_of_2(cdiv(width, group)), next_power_of_2(group)
        warps = row_warps(tile[0] * tile[1], x.get_device())
        form = (width, group, element, scaling, *tile)
        kernel = _fp_quantize_kernel[(row_count(x),)]
        kernel(x.contiguous(), tensor_scale, out, scales, *form, num_warps=warps)


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


def _codes_and_scale(
    x: Tensor, scaling: str, group_size: int, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    groups = x.shape[-1] // group_size if scaling == "group" else 1
    scale = torch.empty(*x.shape[:-1], groups, dtype=torch.float32, device=x.device)
    return codes, scale


@registered("fp8_quantize", _codes_and_scale)
def _fp8_quantize(
    x: Tensor, scaling: str, group_size: int, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_float(x, "fp8_quantize")
    codes, scale = _codes_and_scale(x, scaling, group_size, tensor_scale)
    _launch(x, tensor_scale, codes, scale, "e4m3", scaling, group_size)
    return codes, scale


def fp8_quantize(
    x: Tensor, scaling: Scaling, group_size: int = 0, tensor_scale: Tensor | None = None
) -> QuantizedInput:
    """As `reference.fp8_quantize`; the maximum of a whole tensor is PyTorch's."""
    if scaling in ("token", "group"):
        return QuantizedInput(*_fp8_quantize(x, scaling, group_size, None))
    check_float(x, "fp8_quantize")
    of_tensor = fp_tensor_scale(x.float(), "e4m3") if scaling == "tensor" else tensor_scale
    codes, _ = _fp8_quantize(x, "static", 0, of_tensor)
    assert of_tensor is not None
    return QuantizedInput(codes, of_tensor.float())
