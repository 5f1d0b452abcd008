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

from ..reference import largest_group_multiplier
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
    assert loaded is not None
    getattr(loaded, name)(*arguments)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype and contiguous; asked first, as PyTorch takes longer to do nothing."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _held(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`_ready`, for what may be absent."""
    return None if tensor is None else _ready(tensor, dtype)


def _typed(x: Tensor) -> Tensor:
    """In a dtype that the operators read, and contiguous."""
    return _ready(x, x.dtype if x.dtype in TYPES else torch.float32)


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
    x = _typed(x)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(*x.shape[:-1], 1)
    held = _held(multiplier, torch.int8)
    step = _held(scale, torch.float32)
    factors = None if rotation is None else _Factors(*rotation)
    _call(
        "smoothq_quantize",
        x.data_ptr(),
        TYPES[x.dtype],
        scales.numel(),
        x.shape[-1],
        *(_NO_ROTATION if factors is None else factors.arguments),
        MODES[mode],
        bits,
        group_size or 0,
        0 if group_size is None else largest_group_multiplier(bits),
        clip,
        _address(held),
        _address(step),
        codes.data_ptr(),
        scales.data_ptr(),
    )
    return codes, tied(scales, x)


_NO_ROTATION = (None, None, 0, 0)


class _Factors:
    """A rotation's factors as the interface takes them, alive as long as this is."""

    def __init__(self, signs: Tensor, left: Tensor, right: Tensor) -> None:
        self._signs, self._left = signs.contiguous(), left.contiguous()
        sizes = (left.shape[0], right.shape[0])
        self.arguments = (self._signs.data_ptr(), self._left.data_ptr(), *sizes)


def rotate(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `reference.hadamard`, in float32: float (..., K) → the same shape and dtype."""
    typed, factors = _typed(x), _Factors(signs, left, right)
    rotated = torch.empty_like(typed)
    tokens, width = typed.numel() // typed.shape[-1], typed.shape[-1]
    _call(
        "smoothq_rotate",
        typed.data_ptr(),
        TYPES[typed.dtype],
        tokens,
        width,
        *factors.arguments,
        rotated.data_ptr(),
    )
    return tied(rotated.to(x.dtype), x)


def _output(tokens: int, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((tokens, rows), dtype=dtype if dtype in TYPES else torch.float32)


def int8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.int8_gemm`, for few tokens: each weight is read once."""
    codes, weight = _ready(codes, torch.int8), _ready(weight, torch.int8)
    scale, weight_scale, bias = _scales(scale, weight_scale, bias)
    out = _output(codes.shape[0], weight.shape[0], dtype)
    _call(
        "smoothq_int8_gemm",
        codes.data_ptr(),
        scale.data_ptr(),
        int(scale.numel() > 1),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        _address(bias),
        *out.shape,
        codes.shape[1],
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
    codes, packed = _ready(codes, torch.int8), _ready(packed, torch.uint8)
    scale, weight_scale, bias = _scales(scale, weight_scale, bias)
    held = _held(multiplier, torch.int8)
    out = _output(codes.shape[0], packed.shape[0], dtype)
    _call(
        "smoothq_int4_gemm",
        codes.data_ptr(),
        scale.data_ptr(),
        int(scale.numel() > 1),
        packed.data_ptr(),
        weight_scale.data_ptr(),
        _address(held),
        1 if held is None else held.shape[1],
        _address(bias),
        *out.shape,
        codes.shape[1],
        out.data_ptr(),
        TYPES[out.dtype],
    )
    return out if out.dtype is dtype else out.to(dtype)


def scaled(
    totals: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """totals, int32 (M, N), times both scales, plus the bias; float32 takes totals' own memory."""
    scale, weight_scale, bias = _scales(scale, weight_scale, bias)
    half = dtype == torch.bfloat16
    out = totals.new_empty(totals.shape, dtype=dtype) if half else totals.view(torch.float32)
    _call(
        "smoothq_scale",
        totals.data_ptr(),
        scale.data_ptr(),
        int(scale.numel() > 1),
        weight_scale.data_ptr(),
        _address(bias),
        *totals.shape,
        out.data_ptr(),
        TYPES[out.dtype],
    )
    return out if out.dtype is dtype else out.to(dtype)


def _scales(
    scale: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in float32."""
    floats = _held(bias, torch.float32)
    return _ready(scale, torch.float32), _ready(weight_scale, torch.float32), floats


def unpacked(packed: Tensor, columns: int, multiplier: Tensor | None) -> Tensor:
    """As `reference.unpack_int4`, times the multipliers of groups: int8 (N, K)."""
    packed = _ready(packed, torch.uint8)
    held = _held(multiplier, torch.int8)
    out = torch.empty(packed.shape[0], columns, dtype=torch.int8)
    groups = 1 if held is None else held.shape[1]
    rows = (packed.shape[0], columns)
    _call("smoothq_unpack", packed.data_ptr(), _address(held), groups, *rows, out.data_ptr())
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
    x32, packed, scale = _ready(x, torch.float32), packed.contiguous(), _typed(weight_scale)
    held = _held(multiplier, torch.int8)
    floats = _held(bias, torch.float32)
    out = torch.empty(x.shape[0], packed.shape[0])
    _call(
        "smoothq_weight_only_gemm",
        x32.data_ptr(),
        packed.data_ptr(),
        bits,
        scale.data_ptr(),
        TYPES[scale.dtype],
        _address(held),
        scale.shape[1] if held is None else held.shape[1],
        _address(floats),
        *out.shape,
        x.shape[1],
        out.data_ptr(),
    )
    return out.to(x.dtype)
