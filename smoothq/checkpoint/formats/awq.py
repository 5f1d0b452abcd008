"""AWQ as AutoAWQ stores it for its GEMM kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ..stored import WeightFiles
from ..weight_files import Spec
from .bits import WORD, unpack
from .format import EncodedWeight, Format, ScaledWeight

BITS = 4
PACKED = WORD // BITS
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of 8 neighbouring columns lies


@dataclass(frozen=True)
class _AwqWeight(ScaledWeight):
    """Codes packed along the outputs, (in, out / 8); scales and zero points are (groups, out)."""

    def code_values(self, files: WeightFiles, first: int, last: int) -> Tensor:
        begin = first // PACKED
        words = files.part(self.codes, slice(None), slice(begin, -(-last // PACKED)))
        columns = slice(first - begin * PACKED, last - begin * PACKED)
        return _unpack(words)[:, columns].T

    def scale_grid(self, files: WeightFiles) -> Tensor:
        return files.tensor(self.scale).T

    def zero_grid(self, files: WeightFiles) -> Tensor:
        assert self.zeros is not None
        return _unpack(files.tensor(self.zeros)).T


def _unpack(words: Tensor) -> Tensor:
    """Codes in their order: uint8 (rows, columns) of int32 (rows, columns / 8)."""
    codes = unpack(words, BITS, PACKED * words.shape[-1])
    ordered: Tensor = codes.unflatten(-1, (-1, PACKED))[..., ORDER].flatten(-2)
    return ordered


class Awq(Format):
    """Weights of 4 bits in groups of inputs."""

    def read(self, config: dict[str, Any]) -> str:
        """The label. Raises UnsupportedModelError for another layout or number of bits."""
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        bits = config.get("bits", config.get("w_bit"))
        if layout != "gemm" or bits != BITS:
            raise UnsupportedModelError(
                f"{self.name} is already quantized, by AWQ in the layout '{layout}' and {bits} "
                f"bits; read is 'gemm' in {BITS}"
            )
        return f"AWQ in {BITS} bits"

    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """Each matrix of packed words."""
        for codes, spec in files.specs.items():
            module = codes.removesuffix(".qweight")
            if module == codes:
                continue
            scale, zeros = f"{module}.scales", f"{module}.qzeros"
            if spec.dtype != torch.int32 or not {scale, zeros} <= files.specs.keys():
                raise CheckpointError(
                    f"{self.name}: '{codes}' is {spec.dtype}; AWQ has int32, scales and qzeros"
                )
            columns, rows = spec.shape[0], PACKED * spec.shape[1]
            groups = files.specs[scale].shape[0]
            if files.specs[scale].shape[1:] != (rows,) or columns % groups:
                raise self.misfit(scale, (rows, columns), files.specs[scale].shape)
            yield _AwqWeight(
                f"{module}.weight",
                Spec((rows, columns), self.dtype),
                codes,
                scale,
                (1, columns // groups),
                zeros,
            )
