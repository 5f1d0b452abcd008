"""What the launchers share: autotuning over named tiles, and the choice of block sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import PACKED_BLOCK

INTERPRETED = bool(triton.knobs.runtime.interpret)
DECODE_TOKENS = 16  # up to this many tokens a product is bound by the bytes of its weight
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Kernel = Any  # a triton.JITFunction or Autotuner: launched as kernel[grid](*args)


def tuned(
    tiles: dict[str, triton.Config], key: Iterable[str], fit: Callable[..., Any] | None = None
) -> Callable[[Kernel], Kernel]:
    """A kernel that takes the fastest of a few named tiles, timed once a key and kept on disk.

    fit: which of the tiles the arguments allow. The interpreter does not measure: it takes the
    first tile.
    """
    configs = list(tiles.values())[: 1 if INTERPRETED else None]
    prune = None if fit is None else {"early_config_prune": fit}
    decorator = triton.autotune(configs, key=list(key), prune_configs_by=prune, cache_results=True)
    return cast(Callable[[Kernel], Kernel], decorator)


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


def token_bucket(tokens: int) -> int:
    """The size class a product is tuned for: the next power of two, at most 8,192."""
    return min(int(triton.next_power_of_2(max(tokens, 1))), 8192)


@cache
def _target() -> tuple[str, int | str]:
    """The compiler's backend and the chip: ("cuda", 90), ("hip", "gfx942"), ("interpreter", 0)."""
    if INTERPRETED:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def runs_ptx() -> bool:
    """Whether kernels may hold PTX: on NVIDIA's GPUs, not on AMD's nor in the interpreter."""
    return _target()[0] == "cuda"


def carries_float_sums() -> bool:
    """Whether a product of floats, its left operand in registers, may carry its sum between steps.

    Not on Hopper: its tensor cores then run on while the next step's operand is unpacked, and the
    compiler puts that into registers that they still read (Triton 3.6 and 3.7, issue 9433; the
    tests look for it in the machine code). A sum of each step by itself is waited for.
    """
    return _target() != ("cuda", 90)


def most_tokens(out: torch.dtype) -> int:
    """The widest tile of tokens, beside 128 rows, whose sums and operands fit the registers.

    Hopper's tensor cores read the tokens from shared memory; the others' hold them in registers.
    """
    return 256 if _target() == ("cuda", 90) and out.itemsize == 2 else 128


def packed_tokens(operator: str, group_size: int | None) -> int:
    """See `kernels.packed_tokens`: any number where half a packed block lies in one group, else 0.

    Half a packed block is 32 columns; None for `group_size` is one scale a row.
    """
    del operator  # both products of packed weights read the same blocks
    return sys.maxsize if group_size is None or group_size % (PACKED_BLOCK // 2) == 0 else 0


def row_warps(width: int) -> int:
    """Warps for a program that holds `width` float32 values: 32 values a thread.

    A program has 1,024 threads at most: 32 warps, or 16 of AMD's, which are twice as wide.
    """
    return min(max(width // 1024, 1), 16 if _target()[0] == "hip" else 32)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once on a device, in multiples of its occupancy."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_by_row(kernel: Kernel, rows: Tensor, *arguments: object) -> None:
    """Launch a kernel on rows (M, K), a program a row; its last argument is K, padded."""
    if rows.shape[0]:
        block = triton.next_power_of_2(rows.shape[1])
        kernel[(rows.shape[0],)](rows, *arguments, block, num_warps=row_warps(block))


def rows_of(x: Tensor) -> Tensor:
    """x, (..., K), as contiguous rows (M, K): a view where x is contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def on_its_device(
    launcher: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """Launch on the GPU that holds the first tensor: Triton takes whichever is current."""

    @wraps(launcher)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return guarded


def contiguous(x: Tensor | None) -> Tensor | None:
    """x as the kernels walk through it; None stays None."""
    return None if x is None else x.contiguous()


def check_float(x: Tensor, operator: str) -> None:
    """Raise TypeError unless x has a dtype that the kernels read."""
    if x.dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise TypeError(f"{operator}: the Triton kernels take {known}, not {x.dtype}")
