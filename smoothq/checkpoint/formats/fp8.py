"""FP8 as transformers' `fp8` stores it: DeepSeek, Qwen, MiniMax, GLM, and MXFP8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...kernels.formats import E8M0_BIAS
from ..stored import WeightFiles
from ..weight_files import Spec
from .bits import fp4
from .format import FP8, Blocks, EncodedWeight, Format, ScaledWeight

# Ends of the names of a weight and of its scales.
_NAMES = (
    ("", "_scale_inv"),
    (".weight", ".scale"),
    (".weight", ".qscale_weight"),
    (".weight", ".weight_scale"),
)


@dataclass(frozen=True)
class _Fp8Weight(ScaledWeight):
    """FP8 codes, or pairs of FP4 codes in a byte, times a float32 scale."""

    def code_values(self, files: WeightFiles, first: int, last: int) -> Tensor:
        codes = super().code_values(files, first, last)
        return fp4(codes) if codes.dtype == torch.int8 else codes

    def scale_values(self, files: WeightFiles, stored: Tensor) -> Tensor:  # noqa: ARG002
        return scale_in_float32(stored)


def scale_in_float32(stored: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two."""
    if stored.dtype == torch.uint8:
        powers: Tensor = (stored.float() - E8M0_BIAS).exp2()
        return powers
    return stored.float()


class Fp8(Format):
    """Weights in FP8 with a scale for a block, a row or a matrix.

    The block of an element is (row // rows, column // columns) of the config's block size, also
    where the last block is short. In blocks that the config does not name, as of DeepSeek-V4's FP4
    experts, the scales divide a matrix evenly.
    """

    def read(self, config: dict[str, Any]) -> str:
        """The label. Raises UnsupportedModelError for blocks that are no pair of numbers."""
        size = config.get("weight_block_size")
        self._known: tuple[Blocks, ...] = () if size is None else (tuple(size),)
        if size is None:
            return "FP8"
        if len(size) != 2 or not all(isinstance(part, int) and part > 0 for part in size):
            raise UnsupportedModelError(f"{self.name}: its config says weight_block_size = {size}")
        return f"FP8 in blocks of {size[0]} × {size[1]}"  # noqa: RUF001

    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """Each FP8 tensor that has a scale."""
        for name, spec in files.specs.items():
            if spec.dtype not in (*FP8, torch.int8) or len(spec.shape) < 2:
                continue
            for end, scale_end in _NAMES:
                scale = name.removesuffix(end) + scale_end
                if name.endswith(end) and scale in files.specs:
                    halves = 2 if spec.dtype == torch.int8 else 1
                    shape = (*spec.shape[:-1], halves * spec.shape[-1])
                    blocks = self.blocks(scale, shape, files.specs[scale].shape, *self._known)
                    yield _Fp8Weight(name, Spec(shape, self.dtype), name, scale, blocks)
                    break
