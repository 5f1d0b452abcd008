"""The compiled operators: `csrc/`, built into `_operators` when smoothq is installed.

They are reached in two ways. Python calls them directly, without PyTorch's dispatcher, which takes
longer than a product of one token. Compilers, and programs without Python, find them registered as
`torch.ops.smoothq`. SMOOTHQ_CPU_ISA names the instruction set that runs, in place of the best that
the processor has (`isas`), or `pytorch`: PyTorch's own operators, which are slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..tracing import is_traced, tied

CHOICE = "SMOOTHQ_CPU_ISA"
PYTORCH = "pytorch"
ELEMENTS = {"e4m3": 1, "e2m1": 2}  # of table.h's Element
SCALINGS = {"token": 0, "static": 1, "group": 2, "e8m0": 3, "e4m3": 4}  # of its FpScaling
MODES = {"token": 0, "full_range": 1, "smoothed": 2, "static": 3, "groups": 4}  # of table.h's Mode


def _load() -> ModuleType | ImportError | None:
    """The library; None where PyTorch's operators were chosen; why it cannot be loaded."""
    # transformers looks for a package called `kernels`, and imports this one where it lies in the
    # current directory, as in a checkout: a second library could not register the same operators.
    if os.environ.get(CHOICE) == PYTORCH or __package__.partition(".")[0] == "kernels":
        return None
    try:
        from . import _operators
    except ImportError as error:
        return error
    _operators.start(
        torch.Tensor.__dlpack_c_exchange_api__,
        *(Tensor, nn.Parameter, torch.float32, torch.bfloat16),
    )
    loaded: ModuleType = _operators
    return loaded


_LIBRARY = _load()


def is_compiled() -> bool:
    """Whether the compiled operators run; False where PyTorch's own were chosen.

    Raises:
        RuntimeError: they were not built for this installation.
    """
    if isinstance(_LIBRARY, ImportError):
        raise RuntimeError(
            "smoothq was installed without its CPU operators: install a wheel, or the source with "
            f"a C++ compiler; {CHOICE}={PYTORCH} runs PyTorch's own operators in their place, more "
            f"slowly ({_LIBRARY})"
        ) from _LIBRARY
    return _LIBRARY is not None


def is_loaded() -> bool:
    """Whether the library is there, with its operators registered."""
    return isinstance(_LIBRARY, ModuleType)


def direct(operator: str) -> Callable[..., Any]:
    """The call of a compiled operator that PyTorch's dispatcher does not see.

    It answers None where the operands are not plain tensors on the CPU, or where the registered
    operator is faster; so does what is returned for an operator that has no such call.
    """
    call: Callable[..., Any] = getattr(_LIBRARY, operator, _elsewhere)
    return call


def _elsewhere(*operands: object) -> None:
    """None: no operator here."""


def isa() -> str:
    """The instruction set that runs, or `pytorch`."""
    return str(direct("isa")() or PYTORCH)


def isas() -> list[str]:
    """The instruction sets of this processor that were compiled for, the best first."""
    return list(direct("isas")() or [])


def use_isa(name: str) -> None:
    """Run another instruction set from now on, in every thread: for tests and comparisons.

    Raises:
        ValueError: the processor does not have it, or nothing was compiled for it.
    """
    direct("use_isa")(name)


_quantize, _hadamard, _unpack = direct("quantize"), direct("hadamard"), direct("unpack")
_fp_quantize = direct("fp_quantize")


def quantize(
    x: Tensor,
    mode: str,
    bits: int,
    clip: float = 1.0,
    *,
    group_size: int = 0,
    multiplier: Tensor | None = None,
    scale: Tensor | None = None,
    rotation: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes int8 (..., K) and scales float32 (..., 1) of x, float (..., K), rotated first.

    mode: of `MODES`. group_size: of `groups`, the channels of a multiplier. multiplier: of
    `smoothed`, int8 (K,). scale: of `static`, of one element. rotation: signs, left and right of
    `reference.hadamard`. Raises ValueError for an operand that does not fit.
    """
    signs, left, right = rotation or (None, None, None)
    order = 0 if right is None else right.shape[0]
    operands = (x, MODES[mode], bits, clip, group_size, multiplier, scale, signs, left, order)
    quantized = None if is_traced(x) else _quantize(*operands)
    codes, scales = torch.ops.smoothq.cpu_quantize(*operands) if quantized is None else quantized
    return codes, tied(scales, x)


def fake_quantized(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """Codes and scales of the right shapes, for compilers."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(
        (*x.shape[:-1], 1), dtype=torch.float32
    )


def fp_quantized(
    x: Tensor, element: str, scaling: str, group_size: int, tensor_scale: Tensor | None
) -> Tensor:
    """As `reference.fp_quantize`, in every scaling of `SCALINGS`: float32 (..., K)."""
    operands = (x, ELEMENTS[element], SCALINGS[scaling], group_size, tensor_scale)
    rounded = None if is_traced(x) else _fp_quantize(*operands)
    result: Tensor = torch.ops.smoothq.cpu_fp_quantize(*operands) if rounded is None else rounded
    return tied(result, x)


def rotate(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, in float32: float (..., K) → the same shape and dtype."""
    operands = (x, signs, left, right.shape[0])
    rotated = None if is_traced(x) else _hadamard(*operands)
    result: Tensor = torch.ops.smoothq.cpu_hadamard(*operands) if rotated is None else rotated
    return tied(result, x)


def unpacked(packed: Tensor, columns: int, multiplier: Tensor | None) -> Tensor:
    """As `reference.unpack_int4`, times the multipliers of groups: int8 (N, K)."""
    codes: Tensor = _unpack(packed, columns, multiplier)
    return codes
