"""What the launchers share: autotuning over named tiles, and the choice of block sizes.

A launcher's own time counts: a decode step of a small model is bound by it. So sizes are computed
by plain integers (`triton.cdiv` takes 5 µs on the host), and a tile that was chosen is looked up by
what the launcher knows of a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from functools import cache, wraps
from threading import Lock
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import PACKED_BLOCK
from ..tracing import is_traced, needs_gradient

INTERPRETED = bool(triton.knobs.runtime.interpret)
DECODE_TOKENS = 16  # up to this many tokens a product is bound by the bytes of its weight
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Kernel = Any  # a triton.JITFunction: launched as kernel[grid](*args)
Grid = Callable[[dict[str, Any]], tuple[int, ...]]  # the programs of a launch, from its tile


class Tuned:
    """A kernel that takes the fastest of a few named tiles, timed once a key and kept on disk."""

    def __init__(
        self,
        kernel: Kernel,
        tiles: dict[str, triton.Config],
        key: Iterable[str],
        fit: Callable[..., Any] | None = None,
    ) -> None:
        """Set the tiles up; nothing is timed yet.

        Args:
            kernel: a triton.JITFunction, or one with heuristics, which may depend on the form of a
                call and its tile alone.
            tiles: by name. The interpreter does not measure: it takes the first.
            key: the parameters by which tiles are timed anew, beside the operands' dtypes.
            fit: which of the tiles the arguments allow; None for all.
        """
        self._kernel, self._key = kernel, list(key)
        self._configs = list(tiles.values())[: 1 if INTERPRETED else None]
        self._prune = None if fit is None else {"early_config_prune": fit}
        self._tuners: dict[Hashable, Any] = {}
        self._chosen: dict[tuple[Hashable, ...], dict[str, Any]] = {}
        self._lock = Lock()
        self._heuristics: dict[str, Callable[[dict[str, Any]], Any]] = {}
        if isinstance(kernel, triton.runtime.Heuristics):
            self._heuristics, kernel = kernel.values, kernel.fn
        self._run, self._parameters = kernel.run, kernel.arg_names

    def launch(self, form: tuple[Hashable, ...], grid: Grid, *args: Any, **named: Any) -> None:
        """Launch the kernel with its tile.

        Args:
            form: of the call, which decides the tile: the index of the current GPU, then at least
                what `key` names, every dtype, and what `fit` and heuristics read.
            grid: the number of programs.
            args: of the kernel.
            named: of the kernel, by name.
        """
        settings = self._chosen.get(form)
        if settings is None:
            with self._lock:  # a tuner has one call in hand
                settings = self._settings(form[0], grid, args, named)
            self._chosen[form] = settings
        self._run(*args, grid=grid(settings), warmup=False, **named, **settings)

    def _settings(
        self, device: Hashable, grid: Grid, args: tuple[Any, ...], named: dict[str, Any]
    ) -> dict[str, Any]:
        """The fastest tile for a call, with what heuristics add to it, as named arguments."""
        config = self._configs[0]
        if len(self._configs) > 1:
            if device not in self._tuners:
                prune = self._prune
                tune = triton.autotune(self._configs, self._key, prune, cache_results=True)
                self._tuners[device] = tune(self._kernel)
            self._tuners[device].run(*args, grid=grid, warmup=False, **named)
            config = self._tuners[device].best_config
        settings: dict[str, Any] = config.all_kwargs()
        values = {**dict(zip(self._parameters, args, strict=False)), **named, **settings}
        return settings | {name: value(values) for name, value in self._heuristics.items()}


def tile(n: int, m: int, warps: int, stages: int, band: int = 1, **more: int) -> triton.Config:
    """A tile of n output features and m tokens; `band` tiles of tokens are walked together."""
    sizes = {"BLOCK_N": n, "BLOCK_M": m, "BAND": band, **more}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def operand(dtype: torch.dtype) -> tl.dtype:
    """What a float product's operands are multiplied as: their own dtype.

    The interpreter multiplies bfloat16's bits as integers, so there they go in as float32: the
    same values, since products of them are exact in float32 either way.
    """
    return tl.float32 if INTERPRETED else FLOATS[dtype]


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def tiles_grid(M: int, N: int) -> Grid:
    """A program for each tile of a product (M, N), M tokens and N output features."""

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (cdiv(M, meta["BLOCK_M"]) * cdiv(N, meta["BLOCK_N"]),)

    return grid


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, a positive number."""
    return 1 << (n - 1).bit_length()


@cache
def _target(device: int) -> tuple[str, int | str]:
    """The compiler's backend and the chip: ("cuda", 90), ("hip", "gfx942"), ("interpreter", 0).

    device: the index of the current GPU, as in all that follows.
    """
    if INTERPRETED:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def runs_ptx(device: int) -> bool:
    """Whether kernels may hold PTX: on NVIDIA's GPUs, not on AMD's nor in the interpreter."""
    return _target(device)[0] == "cuda"


FP8_TARGETS = (("cuda", 89), ("cuda", 90), ("cuda", 100), ("hip", "gfx950"))
MX_TARGETS = (("cuda", 100), ("hip", "gfx950"))


def multiplies_fp8(device: torch.device, architecture: str | None = None) -> bool:
    """See `kernels.multiplies_fp8`: Ada, Hopper, Blackwell's B200 and AMD's MI350 do.

    Others that may are left out until the tests have compiled for them; MI300 multiplies a format
    of its own, of another bias.
    """
    return _is_among(device, architecture, FP8_TARGETS)


def multiplies_mx(device: torch.device, architecture: str | None = None) -> bool:
    """See `kernels.multiplies_mx`: Blackwell's B200 and AMD's MI350 do."""
    return _is_among(device, architecture, MX_TARGETS)


def _is_among(
    device: torch.device, architecture: str | None, targets: tuple[tuple[str, int | str], ...]
) -> bool:
    if device.type != "cuda":
        return False
    if architecture is not None:
        return architecture in {f"sm_{chip}" for backend, chip in targets if backend == "cuda"}
    with torch.cuda.device(device):
        return _target(torch.cuda.current_device()) in targets


def carries_float_sums(device: int) -> bool:
    """Whether a product of floats, its left operand in registers, may carry its sum between steps.

    Not on Hopper: its tensor cores then run on while the next step's operand is unpacked, and the
    compiler puts that into registers that they still read (Triton 3.6 and 3.7, issue 9433; the
    tests look for it in the machine code). A sum of each step by itself is waited for.
    """
    return _target(device) != ("cuda", 90)


def most_tokens(out: Tensor) -> int:
    """The widest tile of tokens, beside 128 rows, whose sums and operands fit the registers.

    Hopper's tensor cores read the tokens from shared memory; the others' hold them in registers.
    """
    hopper = _target(out.get_device()) == ("cuda", 90)
    return 256 if hopper and out.dtype.itemsize == 2 else 128


def packed_tokens(operator: str, group_size: int | None) -> int:
    """See `kernels.packed_tokens`: any number where half a packed block lies in one group, else 0.

    Half a packed block is 32 columns; None for `group_size` is one scale a row.
    """
    del operator  # both products of packed weights read the same blocks
    return sys.maxsize if group_size is None or group_size % (PACKED_BLOCK // 2) == 0 else 0


def row_warps(width: int, device: int) -> int:
    """Warps for a program that holds `width` float32 values: 32 values a thread.

    A program has 1,024 threads at most: 32 warps, or 16 of AMD's, which are twice as wide.
    """
    return min(max(width // 1024, 1), 16 if _target(device)[0] == "hip" else 32)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once on a device, in multiples of its occupancy."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_by_row(kernel: Kernel, x: Tensor, *arguments: object) -> None:
    """Launch a kernel on contiguous x (..., K), a program a row; its last argument is K, padded."""
    if rows := row_count(x):
        block = next_power_of_2(x.shape[-1])
        warps = row_warps(block, x.get_device())
        kernel[(rows,)](x, *arguments, block, num_warps=warps)


def row_count(x: Tensor) -> int:
    """The rows of x, (..., K): what `reshape` would tell, which makes a tensor."""
    return x.numel() // x.shape[-1]


def on_its_device(
    launcher: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """Launch on the GPU that holds the first tensor: Triton takes whichever is current."""

    @wraps(launcher)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first: Any = args[0]
        device = first.get_device()
        if device < 0 or device == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return guarded


class Registered(Generic[Arguments, Result]):
    """A launcher that is registered with PyTorch, as `smoothq::triton_NAME`.

    The registered operator is called under tracing and autograd only: for one token, PyTorch's
    dispatcher takes longer than the launcher.
    """

    def __init__(
        self, name: str, launcher: Callable[Arguments, Result], fake: Callable[..., Any]
    ) -> None:
        """Register a launcher.

        Args:
            name: as above.
            launcher: launches kernels on the current GPU.
            fake: the launcher's results without data, from the same arguments.
        """
        wraps(launcher)(self)
        self.direct = on_its_device(launcher)
        self.registered = torch.library.custom_op(f"smoothq::triton_{name}", mutates_args=())(
            self.direct
        )
        self.registered.register_fake(fake)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Run the launcher on the device of the first argument."""
        first: Any = args[0]
        if is_traced(first) or needs_gradient(args):
            result: Result = self.registered(*args, **kwargs)
            return result
        return self.direct(*args, **kwargs)


def registered(
    name: str, fake: Callable[..., Any]
) -> Callable[[Callable[Arguments, Result]], Registered[Arguments, Result]]:
    """Register a launcher with PyTorch: see `Registered`."""
    return lambda launcher: Registered(name, launcher, fake)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x as the kernels walk through it; None stays None."""
    return None if x is None else x.contiguous()


def dtypes(operands: Iterable[Tensor | None]) -> list[torch.dtype | None]:
    """The dtype of each operand, None for one that is not there."""
    return [None if operand is None else operand.dtype for operand in operands]


def check_float(x: Tensor, operator: str) -> None:
    """Raise TypeError unless x has a dtype that the kernels read."""
    if x.dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise TypeError(f"{operator}: the Triton kernels take {known}, not {x.dtype}")
