"""The operators that run a quantized model, dispatched by the device of their first tensor.

`reference.py` defines the result of every operator, and `report` names those that each layer of a
model runs. Code outside of this package calls an operator here, never a backend.

Matrix products and attention are registered with PyTorch as custom operators with fake
implementations, so that `torch.compile(fullgraph=True)`, CUDA graphs and `torch.export` treat each
as one node. So are the quantizers on a GPU; on a CPU a compiler traces them as plain tensor code,
which it can fuse.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

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
from .tracing import is_traced, needs_gradient, refuse_gradient
from .tuning import TOKEN_BUCKETS, run_through

__all__ = [
    "MULTIPLIED_BITS",
    "QuantizedInput",
    "cached_attention",
    "channel_multipliers",
    "expert_gemm",
    "expert_weight_only_gemm",
    "fp8_gemm",
    "fp8_quantize",
    "fp_gemm",
    "fp_quantize",
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
    "load",
    "multiplies_fp8",
    "multiplies_mx",
    "mx_gemm",
    "mx_quantize",
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
    "tune",
    "weight_only_gemm",
]

_BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # device type → module; "cuda" is ROCm's name too
_LOADED: dict[str, ModuleType] = {"cpu": cpu}  # Triton is imported when a GPU's tensor first comes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def runs_on(device_type: str) -> bool:
    """Whether there is a backend for a type of device.

    Args:
        device_type: as `torch.device.type` has it: "cpu", "cuda" (ROCm too), …
    """
    return device_type in _BACKENDS


def load(device: torch.device) -> None:
    """Import the backend of a device, if it has one: a compiler could not, when it first traces.

    Args:
        device: where the operators will run.

    Raises:
        NotImplementedError: the backend needs a package that is not installed.
    """
    if runs_on(device.type):
        _backend(device, "load")


def packed_tokens(operator: str, device: torch.device, group_size: int | None) -> int:
    """The most tokens for which a product runs fastest on packed 4-bit weights; 0 for none.

    For more tokens `QuantizedLinear` multiplies by an int8 copy of the weight.

    Args:
        operator: "int4_gemm" or "weight_only_gemm".
        device: where it runs.
        group_size: input channels that share a scale of the weight; None for one scale a row.

    Raises:
        NotImplementedError: there is no backend for the device.
    """
    return int(_backend(device, operator).packed_tokens(operator, group_size))


def multiplies_fp8(device: torch.device, architecture: str | None = None) -> bool:
    """Whether a device multiplies E4M3 codes themselves, so that `fp8_gemm` is worth its codes.

    Elsewhere `fp_gemm` multiplies what they stand for.

    Args:
        device: where the product runs.
        architecture: of a GPU that is not here, such as `sm_90`; None asks the device.

    Raises:
        NotImplementedError: there is no backend for the device.
    """
    return bool(_backend(device, "fp8_gemm").multiplies_fp8(device, architecture))


def multiplies_mx(device: torch.device, architecture: str | None = None) -> bool:
    """As `multiplies_fp8`, of MXFP8 and MXFP4 codes with their scales, by `mx_gemm`."""
    return bool(_backend(device, "mx_gemm").multiplies_mx(device, architecture))


def left_factor(device: torch.device, base: int, order: int) -> int | None:
    """The order of the left Kronecker factor with which a Hadamard rotation runs fastest.

    H = H_left ⊗ H_right, where H_right is Sylvester's matrix of a power of two, so that H_left can
    be split off with any order that is `base` times a power of two.

    Args:
        device: where it runs.
        base: the order of the factor that is not Sylvester's, always within H_left; 1 where the
            order is a power of two.
        order: of H.

    Returns:
        The order of H_left, or None for the split that the rotation is stored with.

    Raises:
        NotImplementedError: there is no backend for the device.
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
        first: Any = args[0]  # `cast` would be a call
        device = first.device
        kind = device.type
        backend = _LOADED.get(_BACKENDS.get(kind, "")) or _backend(device, name)
        run: Callable[Arguments, Result] = getattr(backend, name)
        # An operator's arithmetic is its definition's: autocast would do parts of it in 16 bits.
        if _autocasts(kind):
            with torch.autocast(kind, enabled=False):
                return run(*args, **kwargs)
        return run(*args, **kwargs)

    return operator


channel_multipliers = _by_device(reference.channel_multipliers)
fp8_quantize = _by_device(reference.fp8_quantize)
fp_quantize = _by_device(reference.fp_quantize)
mx_quantize = _by_device(reference.mx_quantize)
hadamard = _by_device(reference.hadamard)
hadamard_quantize = _by_device(reference.hadamard_quantize)
quantize_heads = _by_device(reference.quantize_heads)
quantize_per_tensor = _by_device(reference.quantize_per_tensor)
quantize_per_token = _by_device(reference.quantize_per_token)
quantize_smoothed = _by_device(reference.quantize_smoothed)
quantize_token_groups = _by_device(reference.quantize_token_groups)
runtime_smooth_quantize = _by_device(reference.runtime_smooth_quantize)
static_quantize = _by_device(reference.static_quantize)


_OPERATORS = torch.library.Library("smoothq", "FRAGMENT")

# Under the name that transformers looks for (see `cpu/native.py`) nothing is registered.
_REGISTERS = __name__ != "kernels"


class Product(Generic[Arguments]):
    """A matrix product or an attention, registered with PyTorch as `smoothq::NAME`.

    The registered operator is called under tracing and autograd only. Otherwise the backend is
    called directly: for one token, PyTorch's dispatcher takes longer than the product.
    """

    def __init__(
        self, definition: Callable[Arguments, Tensor], shape: Callable[..., tuple[int, ...]]
    ) -> None:
        """Register the operator of a function of `reference.py`, as far as C++ has not.

        Args:
            definition: the function; each backend has one of the same name, which runs. Its result
                has the dtype that is its last operand, or else the first operand's.
            shape: of the result, from the operands.
        """
        name = definition.__name__
        self.direct = _by_device(definition)
        self.native = cpu.native.direct(name)
        if not _REGISTERS:
            return
        if not hasattr(torch.ops.smoothq, name):
            _OPERATORS.define(name + torch.library.infer_schema(definition, mutates_args=()))
            _OPERATORS.impl(name, self.direct, "CPU")
        _OPERATORS.impl(name, self.direct, "CUDA")

        def fake(first: Tensor, *rest: object) -> Tensor:
            dtype = rest[-1] if isinstance(rest[-1], torch.dtype) else first.dtype
            return first.new_empty(shape(first, *rest), dtype=dtype)

        register_fake(name, fake)
        self.registered: torch._ops.OpOverload = getattr(torch.ops.smoothq, name).default

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        """Run the operator on the backend of the first argument's device."""
        first: Any = args[0]
        result: Tensor | None = None
        if is_traced(first) or needs_gradient(args):
            result = self.registered(*args, **kwargs)
        elif not kwargs and _BACKENDS.get("cpu") == "cpu":
            result = self.native(*args)
        return self.direct(*args, **kwargs) if result is None else result


def register_fake(name: str, fake: Callable[..., object]) -> None:
    """Tell PyTorch the shape of an operator's result, and that it has no gradient.

    Args:
        name: of the operator, `smoothq::NAME`.
        fake: gives results of the right shapes and dtypes for operands without data.
    """
    torch.library.register_fake(f"smoothq::{name}", fake, lib=_OPERATORS)
    torch.library.register_autograd(f"smoothq::{name}", refuse_gradient, lib=_OPERATORS)


if cpu.native.is_loaded():
    register_fake("cpu_quantize", cpu.native.fake_quantized)
    register_fake("cpu_fp_quantize", lambda x, *form: x.new_empty(x.shape, dtype=torch.float32))
    register_fake("cpu_hadamard", lambda x, *factors: torch.empty_like(x))


int8_gemm = Product(reference.int8_gemm, lambda a, _, w, *rest: (a.shape[0], w.shape[0]))
int4_gemm = Product(reference.int4_gemm, lambda a, _, w, *rest: (a.shape[0], w.shape[0]))
expert_gemm = Product(
    reference.expert_gemm, lambda a, _, ends, weights, *rest: (a.shape[0], weights[0].shape[0])
)
group_gemm = Product(
    reference.group_gemm,
    lambda a, _, block_scale, order, w, *rest: (*a.shape[:2], w.shape[0]),
)
fp8_gemm = Product(reference.fp8_gemm, lambda a, _, w, *rest: (a.shape[0], w.shape[0]))
mx_gemm = Product(reference.mx_gemm, lambda a, _, w, *rest: (a.shape[0], w.shape[0]))
fp_gemm = Product(reference.fp_gemm, lambda x, w, *rest: (x.shape[0], w.shape[0]))
weight_only_gemm = Product(reference.weight_only_gemm, lambda x, w, *rest: (x.shape[0], w.shape[0]))
expert_weight_only_gemm = Product(
    reference.expert_weight_only_gemm,
    lambda x, ends, weights, *rest: (x.shape[0], weights[0].shape[0]),
)
cached_attention = Product(
    reference.cached_attention,
    lambda query, _, v, *rest: (*query.shape[:-1], row_width(v.shape[-1], *rest[-2:])),
)
int8_attention = Product(
    reference.int8_attention,
    lambda query, _, keys, v, mask, scaling, bits, dtype: (
        *query.shape[:-1],
        row_width(v.shape[-1], bits, None) if v.dtype == torch.uint8 else v.shape[-1],
    ),
)


@runtime_checkable
class RunsOperators(Protocol):
    """A layer that can name the operators that its forward runs."""

    @property
    def device(self) -> torch.device:
        """The device that the operators run on."""

    def operators(self) -> tuple[str, ...]:
        """The names of the operators, in the order in which they run; none where none does."""


def _name(device: torch.device) -> str:
    """The name of a device's backend; says so where the CPU's operators are not compiled."""
    backend = _backend(device, "report")
    name = backend.__name__.rpartition(".")[2]
    return name if backend is not cpu or cpu.is_compiled() else f"{name} (not compiled)"


def report(model: nn.Module) -> str:
    """A table of the operators and the backend that every quantized layer of a model runs.

    Layers of the same name in different blocks that run the same operators share a line:

        model.layers.*.mlp.down_proj   x30   hadamard_quantize, int4_gemm   triton on cuda:0

    Experts that are multiplied at once have a line for that; those of their linears say what each
    runs by itself.
    """
    lines: Counter[tuple[str, str, str]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, RunsOperators) and (operators := module.operators()):
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            device = module.device
            lines[kind, ", ".join(operators), f"{_name(device)} on {device}"] += 1
    rows = [(kind, f"x{count}", run, where) for (kind, run, where), count in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def tune(model: nn.Module, tokens: Iterable[int] = TOKEN_BUCKETS) -> str:
    """Choose the tiles of every Triton kernel that a quantized model launches, ahead of time.

    A kernel is timed when it first meets a shape and a size class of tokens, in the middle of an
    answer. Here the model runs once for each class. What is found is kept on disk
    (`TRITON_CACHE_DIR`), for this process and later ones.

    Args:
        model: a quantized causal LM of transformers, on one GPU or several.
        tokens: of the prompts, and of the batches of decode steps.

    Returns:
        A line that says what was done: on a CPU, nothing.
    """
    name = type(model).__name__
    devices = {module.device for module in model.modules() if isinstance(module, RunsOperators)}
    tuned = [device for device in devices if _BACKENDS.get(device.type) == "triton"]
    if not tuned:
        where = ", ".join(sorted(map(str, devices))) or "no device"
        return f"{name}: nothing to tune, its quantized layers are on {where}"
    counts, start = list(tokens), time.perf_counter()
    run_through(model, next(iter(model.parameters())).device, counts)
    where, seconds = ", ".join(sorted(map(str, tuned))), time.perf_counter() - start
    return f"{name}: tuned for {', '.join(map(str, counts))} tokens on {where} in {seconds:.0f} s"
