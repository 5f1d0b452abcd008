"""The C++ half of the CPU operators: compiled once for this processor, then loaded.

PyTorch has no single operator for "rotate, smooth and quantize a token" or for a product of one
token with packed codes, and a chain of small ones costs more than the product itself.
`native.cpp` has them behind a plain C interface; the system's compiler builds it in a few seconds
the first time, into a cache that later processes load from. Its OpenMP threads are PyTorch's own:
`torch.set_num_threads` counts here too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..reference import PACKED_BLOCK, largest_group_multiplier
from ..tracing import tied

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-w",
)
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of native.cpp's enum Type
MODES = {"token": 0, "full_range": 1, "smoothed": 2, "static": 3, "groups": 4}

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ROTATION = [_POINTER, _POINTER, _LONG, _LONG]
_SIZES = [_LONG, _LONG, _LONG]
_OUTPUT = [_POINTER, _INT]
_INTERFACE = {
    "smoothq_quantize": [
        *(_POINTER, _INT, _LONG, _LONG),
        *_ROTATION,
        *(_INT, _INT, _LONG, _INT, _FLOAT),
        *([_POINTER] * 4),
    ],
    "smoothq_rotate": [_POINTER, _INT, _LONG, _LONG, *_ROTATION, _POINTER],
    "smoothq_int8_gemm": [_POINTER, _POINTER, _LONG, *([_POINTER] * 3), *_SIZES, *_OUTPUT],
    "smoothq_int4_gemm": [
        *(_POINTER, _POINTER, _LONG),
        *(_POINTER, _POINTER, _POINTER, _LONG, _POINTER),
        *_SIZES,
        *_OUTPUT,
    ],
    "smoothq_scale": [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, *_OUTPUT],
    "smoothq_unpack": [_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER],
    "smoothq_weight_only_gemm": [
        *(_POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _LONG, _POINTER),
        *_SIZES,
        _POINTER,
    ],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operators; None where they cannot be built, which is said once.

    Without them every operator runs on PyTorch's own: the same integers, more slowly.
    """
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "smoothq's CPU operators were not compiled and PyTorch's run in their place, more "
            f"slowly; they need a C++ compiler with OpenMP (CXX names it): {reason.strip()}",
            stacklevel=2,
        )
        return None
    for name, arguments in _INTERFACE.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def _built() -> Path:
    """The library's file, compiled unless it is there. Raises OSError or CalledProcessError."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "g++"
    identity = "\0".join(
        [SOURCE.read_text("utf-8"), *FLAGS, compiler, platform.machine(), _processor()]
    )
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoothq"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = directory / f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            fresh = Path(scratch) / target.name
            subprocess.run(
                [compiler, *FLAGS, "-o", str(fresh), str(SOURCE)],
                check=True,
                capture_output=True,
                text=True,
            )
            fresh.replace(target)
    return target


def _processor() -> str:
    """What `-march=native` depends on: the processor's instruction sets."""
    return repr(sorted(torch.cpu.get_capabilities().items()))


def is_compiled() -> bool:
    """Whether the compiled operators can run; else PyTorch's run in their place."""
    return library() is not None


def _call(name: str, *arguments: object) -> None:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the C++ operators are not compiled: ask is_compiled() first")
    getattr(loaded, name)(*arguments)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# C++ gets addresses and believes the sizes that come with them, so every operand passes `_integers`
# or `_floats`. What it fills has a dtype and a device of its own, whatever PyTorch's defaults are.


def _integers(name: str, tensor: Tensor, dtype: torch.dtype, numbers: int) -> Tensor:
    """An operand of codes, contiguous. Raises ValueError for another dtype, size or device."""
    if tensor.dtype is not dtype or tensor.numel() != numbers or not tensor.is_cpu:
        raise _unfit(name, tensor, f"{numbers} of {dtype}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _floats(name: str, tensor: Tensor, numbers: int) -> Tensor:
    """An operand of floats, in float32, contiguous. Raises ValueError for another size."""
    if tensor.numel() != numbers or not tensor.is_cpu:
        raise _unfit(name, tensor, f"{numbers} floats")
    # Asked first, as PyTorch takes longer to do nothing.
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _unfit(name: str, tensor: Tensor, wanted: str) -> ValueError:
    shape = tuple(tensor.shape)
    return ValueError(
        f"operand '{name}' is {tensor.dtype} {shape} on {tensor.device}; needed: {wanted} on cpu"
    )


def _typed(x: Tensor) -> Tensor:
    """In a dtype that the operators read, and contiguous."""
    if x.dtype in TYPES and x.is_contiguous():
        return x
    return x.to(x.dtype if x.dtype in TYPES else torch.float32).contiguous()


def _optional_bias(bias: Tensor | None, rows: int) -> Tensor | None:
    """A bias, float32 (rows,), or None where a product has none."""
    return None if bias is None else _floats("bias", bias, rows)


def _row_multipliers(multiplier: Tensor | None, rows: int, width: int) -> tuple[Tensor | None, int]:
    """Multipliers of a matrix's groups, int8 (N, groups) or None, and the groups a row."""
    if multiplier is None:
        return None, 1
    groups = multiplier.shape[-1]
    if groups == 0 or width % groups:
        raise _unfit("multiplier", multiplier, f"groups that divide {width} columns")
    return _integers("multiplier", multiplier, torch.int8, rows * groups), groups


def _check_blocks(width: int, groups: int) -> None:
    """Raise ValueError for groups that products on packed codes would read as others."""
    size = width // groups
    if groups > 1 and size % PACKED_BLOCK and size != PACKED_BLOCK // 2:
        raise ValueError(
            f"groups of {size} columns are neither whole packed blocks of {PACKED_BLOCK} nor halves"
        )


def quantize(
    x: Tensor,
    mode: str,
    bits: int,
    clip: float = 1.0,
    *,
    group_size: int | None = None,
    multiplier: Tensor | None = None,
    scale: Tensor | None = None,
    rotation: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes int8 (..., K) and scales float32 (..., 1) of x, float (..., K), rotated first.

    mode: of `MODES`. group_size: of `groups`, the channels of a multiplier. multiplier: of
    `smoothed`, int8 (K,). scale: of `static`, float32 of one element. rotation: signs, left and
    right of `reference.hadamard`.
    """
    x, width = _typed(x), x.shape[-1]
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits}-bit codes do not fit an int8")
    multipliers = step = None
    if mode == "smoothed":
        multipliers = _integers("multiplier", _given("multiplier", multiplier), torch.int8, width)
    elif mode == "static":
        step = _floats("scale", _given("scale", scale), 1)
    elif mode == "groups" and (not group_size or group_size < 0 or width % group_size):
        raise ValueError(f"group_size {group_size} does not divide {width} channels")
    factors = None if rotation is None else _Factors(*rotation, width)
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device="cpu")
    _call(
        "smoothq_quantize",
        x.data_ptr(),
        TYPES[x.dtype],
        scales.numel(),
        width,
        *(_NO_ROTATION if factors is None else factors.arguments),
        MODES[mode],
        bits,
        group_size or 0,
        0 if group_size is None else largest_group_multiplier(bits),
        clip,
        _address(multipliers),
        _address(step),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return codes, tied(scales, x)


def _given(name: str, operand: Tensor | None) -> Tensor:
    if operand is None:
        raise ValueError(f"operand '{name}' is missing")
    return operand


_NO_ROTATION = (None, None, 0, 0)


class _Factors:
    """A rotation's factors as the interface takes them, alive as long as this is."""

    def __init__(self, signs: Tensor, left: Tensor, right: Tensor, width: int) -> None:
        """width: of the rows to rotate. Raises ValueError where the factors do not fit them."""
        order, power = left.shape[0], right.shape[0]
        # The right factor is not read: it is Sylvester's matrix, of an order that is a power of 2.
        if not order or not power or power & (power - 1) or width % (order * power):
            raise ValueError(
                f"factors of orders {order} and {power} do not rotate rows of {width}; the second "
                "is a power of two, and their product divides the width"
            )
        self._signs = _integers("signs", signs, torch.int8, width)
        self._left = _integers("left", left, torch.int8, order * order)
        self.arguments = (self._signs.data_ptr(), self._left.data_ptr(), order, power)


def rotate(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, in float32: float (..., K) → the same shape and dtype."""
    typed, width = _typed(x), x.shape[-1]
    factors = _Factors(signs, left, right, width)
    rotated = torch.empty_like(typed)
    _call(
        "smoothq_rotate",
        typed.data_ptr(),
        TYPES[typed.dtype],
        typed.numel() // width,
        width,
        *factors.arguments,
        rotated.data_ptr(),
    )
    return tied(rotated.to(x.dtype), x)


def _output(tokens: int, rows: int, dtype: torch.dtype) -> Tensor:
    out_dtype = dtype if dtype in TYPES else torch.float32
    return torch.empty((tokens, rows), dtype=out_dtype, device="cpu")


def int8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int8_gemm`, for few tokens: each weight is read once."""
    (tokens, width), rows = codes.shape, weight.shape[0]
    codes = _integers("codes", codes, torch.int8, tokens * width)
    weight = _integers("weight", weight, torch.int8, rows * width)
    scale, weight_scale, bias = _scales(scale, weight_scale, bias, tokens, rows)
    out = _output(tokens, rows, dtype)
    _call(
        "smoothq_int8_gemm",
        codes.data_ptr(),
        scale.data_ptr(),
        int(scale.numel() > 1),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        _address(bias),
        tokens,
        rows,
        width,
        out.data_ptr(),
        TYPES[out.dtype],
    )
    return out if out.dtype is dtype else out.to(dtype)


def int4_gemm(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int4_gemm`, for few tokens and groups of whole or half blocks."""
    (tokens, width), rows = codes.shape, packed.shape[0]
    codes = _integers("codes", codes, torch.int8, tokens * width)
    packed = _integers("packed", packed, torch.uint8, rows * ((width + 1) // 2))
    multipliers, groups = _row_multipliers(multiplier, rows, width)
    _check_blocks(width, groups)
    scale, weight_scale, bias = _scales(scale, weight_scale, bias, tokens, rows)
    out = _output(tokens, rows, dtype)
    _call(
        "smoothq_int4_gemm",
        codes.data_ptr(),
        scale.data_ptr(),
        int(scale.numel() > 1),
        packed.data_ptr(),
        weight_scale.data_ptr(),
        _address(multipliers),
        groups,
        _address(bias),
        tokens,
        rows,
        width,
        out.data_ptr(),
        TYPES[out.dtype],
    )
    return out if out.dtype is dtype else out.to(dtype)


def scaled(
    totals: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """totals, int32 (M, N), times both scales, plus the bias; float32 takes totals' own memory."""
    tokens, rows = totals.shape
    totals = _integers("totals", totals, torch.int32, tokens * rows)
    scale, weight_scale, bias = _scales(scale, weight_scale, bias, tokens, rows)
    half = dtype == torch.bfloat16
    out = totals.new_empty(totals.shape, dtype=dtype) if half else totals.view(torch.float32)
    _call(
        "smoothq_scale",
        totals.data_ptr(),
        scale.data_ptr(),
        int(scale.numel() > 1),
        weight_scale.data_ptr(),
        _address(bias),
        tokens,
        rows,
        out.data_ptr(),
        TYPES[out.dtype],
    )
    return out if out.dtype is dtype else out.to(dtype)


def _scales(
    scale: Tensor, weight_scale: Tensor, bias: Tensor | None, tokens: int, rows: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in float32: of every token or one for all, of every row, and every row's bias."""
    steps = _floats("scale", scale, tokens if scale.numel() != 1 else 1)
    return steps, _floats("weight_scale", weight_scale, rows), _optional_bias(bias, rows)


def unpacked(packed: Tensor, columns: int, multiplier: Tensor | None) -> Tensor:
    """As `reference.unpack_int4`, times the multipliers of groups: int8 (N, K)."""
    rows = packed.shape[0]
    packed = _integers("packed", packed, torch.uint8, rows * ((columns + 1) // 2))
    multipliers, groups = _row_multipliers(multiplier, rows, columns)
    out = torch.empty((rows, columns), dtype=torch.int8, device="cpu")
    _call(
        "smoothq_unpack",
        packed.data_ptr(),
        _address(multipliers),
        groups,
        rows,
        columns,
        out.data_ptr(),
    )
    return out


def weight_only_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """As `reference.weight_only_gemm`, for few tokens and groups of whole or half blocks."""
    (tokens, width), rows = x.shape, packed.shape[0]
    if bits not in (4, 8) or width % PACKED_BLOCK:
        raise ValueError(
            f"no product of {bits}-bit codes and {width} columns: 4 or 8 bits, and whole blocks of "
            f"{PACKED_BLOCK} columns"
        )
    x32 = _floats("x", x, tokens * width)
    integers = torch.uint8 if bits == 4 else torch.int8
    packed = _integers("packed", packed, integers, rows * width * bits // 8)
    multipliers, groups = _row_multipliers(multiplier, rows, width)
    steps = 1
    if multipliers is None:
        groups = steps = weight_scale.shape[1]
        if not groups or width % groups:
            raise _unfit("weight_scale", weight_scale, f"groups that divide {width} columns")
    _check_blocks(width, groups)
    scale = _typed(weight_scale)
    if scale.numel() != rows * steps or not scale.is_cpu:
        raise _unfit("weight_scale", weight_scale, f"{rows * steps} floats")
    bias = _optional_bias(bias, rows)
    out = torch.empty((tokens, rows), dtype=torch.float32, device="cpu")
    _call(
        "smoothq_weight_only_gemm",
        x32.data_ptr(),
        packed.data_ptr(),
        bits,
        scale.data_ptr(),
        TYPES[scale.dtype],
        _address(multipliers),
        groups,
        _address(bias),
        tokens,
        rows,
        width,
        out.data_ptr(),
    )
    return out.to(x.dtype)
