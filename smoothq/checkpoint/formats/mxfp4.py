"""MXFP4 as GPT-OSS stores its experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...kernels.formats import E8M0_BIAS
from ..stored import WeightFiles
from ..weight_files import Spec
from .bits import fp4
from .format import EncodedWeight, Format

BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class _Experts(EncodedWeight):
    """Stacked experts, (experts, in, out), of blocks of 32 inputs with an exponent each.

    codes: uint8 (experts, out, blocks, 16). scale: name of uint8 (experts, out, blocks).
    """

    scale: str

    @property
    def parts(self) -> tuple[str, ...]:
        return self.codes, self.scale

    def rows(self, files: WeightFiles, first: int, last: int) -> Tensor:
        """The experts `first` to `last`."""
        decoded = fp4(files.part(self.codes, slice(first, last)))
        exponents = files.part(self.scale, slice(first, last)).to(torch.int32) - E8M0_BIAS
        decoded *= torch.pow(2.0, exponents)[..., None]
        return decoded.to(self.spec.dtype).flatten(-2).transpose(-2, -1).contiguous()


class Mxfp4(Format):
    """Experts in MXFP4, all other weights in bfloat16."""

    def read(self, config: dict[str, Any]) -> str:  # noqa: ARG002
        """The label."""
        return "MXFP4 in blocks of 32"

    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """Each pair of blocks and scales."""
        for codes, spec in files.specs.items():
            name = codes.removesuffix(BLOCKS)
            scale = f"{name}{SCALES}"
            if name == codes or spec.dtype != torch.uint8 or scale not in files.specs:
                continue
            if len(spec.shape) != 4 or files.specs[scale].shape != spec.shape[:-1]:
                raise CheckpointError(
                    f"{self.name}: '{codes}' has shape {spec.shape} and '{scale}' has shape "
                    f"{files.specs[scale].shape}: they are no MXFP4 blocks of experts"
                )
            experts, rows, blocks, half = spec.shape
            decoded = Spec((experts, 2 * half * blocks, rows), self.dtype)
            yield _Experts(name, decoded, codes, scale)
