"""The operators that run a quantized model, dispatched by the device of their input.

Nothing outside this package calls a backend. The products are registered with PyTorch as custom
operators with fake implementations, so that `torch.compile(fullgraph=True)`, CUDA graphs and
`torch.export` see them whole; so are the Triton quantizers, while a CPU's are plain tensor code
for a compiler, which may fuse it. `reference.py` defines every result; `report` says what runs
where.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Generic, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from . import cpu, reference
from .reference import (
    MULTIPLIED_BITS,
    QuantizedInput,
    highest_code,
    largest_group_multiplier,
    largest_multiplier,
    row_bytes,
    row_width,
)
from .tracing import is_traced

__all__ = [
    "MULTIPLIED_BITS",
    "QuantizedInput",
    "cached_attention",
    "channel_multipliers",
    "group_gemm",
    "hadamard",
    "hadamard_quantize",
    "highest_code",
    "int4_gemm",
    "int8_attention",
    "int8_gemm",
    "largest_group_multiplier",
    "largest_multiplier",
    "left_factor",
    "packed_tokens",
    "quantize_heads",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_smoothed",
    "quantize_token_groups",
    "report",
    "row_bytes",
    "runs_on",
    "runtime_smooth_quantize",
    "static_quantize",
    "weight_only_gemm",
]

_BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # device type → module; "cuda" is ROCm's name too
_LOADED: dict[str, ModuleType] = {"cpu": cpu}  # Triton is imported when a GPU's tensor first comes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def runs_on(device_type: str) -> bool:
    """Whether there are operators for that kind of device ("cpu", "cuda", …)."""
    return device_type in _BACKENDS


def packed_tokens(operator: str, device: torch.device, group_size: int | None) -> int:
    """Up to how many tokens a product runs fastest on 4-bit weights packed, as they are stored.

    operator: "int4_gemm" or "weight_only_gemm". group_size: of the weight's scales, None for one a
    row. Beyond that number `QuantizedLinear` has them unpacked to int8.
    """
    return int(_backend(device, operator).packed_tokens(operator, group_size))


def left_factor(device: torch.device, base: int, order: int) -> int | None:
    """How a Hadamard matrix of an order runs fastest on a device: the left factor's order.

    base: the order of its part that is no power of two; the left factor is a multiple of it by a
    power of two, the right factor the power of two that is left. None: as the rotation is stored.
    """
    left: int | None = _backend(device, "hadamard").left_factor(base, order)
    return left


def _backend(device: torch.device, operator: str) -> ModuleType:
    """The backend of a device. Raises NotImplementedError naming a device that has none."""
    name = _BACKENDS.get("cpu" if device.type == "meta" else device.type)
    if name is None:
        raise NotImplementedError(
            f"smoothq has no kernel '{operator}' for device '{device}'; "
            f"it runs on: {', '.join(_BACKENDS)}"
        )
    if name not in _LOADED:
        _LOADED[name] = _load(name)
    return _LOADED[name]


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".{name}", __name__)
    except ImportError as error:
        raise NotImplementedError(
            "smoothq's GPU kernels need Triton, which PyTorch for GPUs brings along: "
            f"pip install triton ({error})"
        ) from error


def _autocasts(device_type: str) -> bool:
    return device_type in _BACKENDS and torch.is_autocast_enabled(device_type)


def _by_device(definition: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The operator that `definition` specifies: its namesake in the backend of the first tensor."""
    name = definition.__name__

    @functools.wraps(definition)
    def operator(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = cast(Tensor, args[0]).device
        run = getattr(_backend(device, name), name)
        # An operator's arithmetic is its definition's: autocast would do parts of it in 16 bits.
        if _autocasts(device.type):
            with torch.autocast(device.type, enabled=False):
                return cast(Result, run(*args, **kwargs))
        return cast(Result, run(*args, **kwargs))

    return operator


channel_multipliers = _by_device(reference.channel_multipliers)
hadamard = _by_device(reference.hadamard)
hadamard_quantize = _by_device(reference.hadamard_quantize)
quantize_heads = _by_device(reference.quantize_heads)
quantize_per_tensor = _by_device(reference.quantize_per_tensor)
quantize_per_token = _by_device(reference.quantize_per_token)
quantize_smoothed = _by_device(reference.quantize_smoothed)
quantize_token_groups = _by_device(reference.quantize_token_groups)
runtime_smooth_quantize = _by_device(reference.runtime_smooth_quantize)
static_quantize = _by_device(reference.static_quantize)


def _needs_gradient(operands: tuple[object, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(operand, Tensor) and operand.requires_grad for operand in operands)


class Product(Generic[Arguments]):
    """A product, registered with PyTorch as an operator.

    Called where nothing traces it, it runs at once: on one token, a registered Python operator
    takes as long to call as the product to compute.
    """

    def __init__(self, definition: Callable[Arguments, Tensor]) -> None:
        """definition: of `reference.py`; its namesake in each backend runs."""
        self.direct = _by_device(definition)
        name = f"smoothq::{definition.__name__}"
        self.registered = torch.library.custom_op(name, self.direct, mutates_args=())

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        """The product, by the backend of the first argument's device."""
        if is_traced(cast(Tensor, args[0])) or _needs_gradient(args):
            return cast(Tensor, self.registered(*args, **kwargs))
        return self.direct(*args, **kwargs)


int8_gemm = Product(reference.int8_gemm)
int4_gemm = Product(reference.int4_gemm)
group_gemm = Product(reference.group_gemm)
weight_only_gemm = Product(reference.weight_only_gemm)
cached_attention = Product(reference.cached_attention)
int8_attention = Product(reference.int8_attention)


@int8_gemm.registered.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


@int4_gemm.registered.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], packed.shape[0], dtype=dtype)


@group_gemm.registered.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    order: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1], weight.shape[0], dtype=dtype)


@weight_only_gemm.registered.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@cached_attention.registered.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first_keys: Tensor | None,
    first_values: Tensor | None,
    start: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int | None,
) -> Tensor:
    width = row_width(values.shape[-1], bits, group_size)
    return query.new_empty(*query.shape[:-1], width)


@int8_attention.registered.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    packed, width = values.dtype == torch.uint8, values.shape[-1]
    width = row_width(width, bits, None) if packed else width
    return codes.new_empty(*codes.shape[:-1], width, dtype=dtype)


@runtime_checkable
class RunsOperators(Protocol):
    """A layer that can name the operators of its forward, in the order in which they run."""

    @property
    def device(self) -> torch.device:
        """Where they run."""

    def operators(self) -> tuple[str, ...]:
        """The operators' names."""


def _name(device: torch.device) -> str:
    """What a device's backend is called, and what of it is missing."""
    backend = _backend(device, "report")
    name = backend.__name__.rpartition(".")[2]
    return name if backend is not cpu or cpu.is_compiled() else f"{name} (not compiled)"


def report(model: nn.Module) -> str:
    """Which operator of which backend every quantized layer of a model runs: one line a kind.

    Layers of the same name in different blocks that run the same operators share a line:

        model.layers.*.mlp.down_proj   x30   hadamard_quantize, int4_gemm   triton on cuda:0
    """
    lines: Counter[tuple[str, str, str]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, RunsOperators):
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            device = module.device
            lines[kind, ", ".join(module.operators()), f"{_name(device)} on {device}"] += 1
    rows = [(kind, f"x{count}", run, where) for (kind, run, where), count in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
