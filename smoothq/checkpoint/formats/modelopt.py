"""FP8 and NVFP4 as NVIDIA's ModelOpt stores them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ..stored import WeightFiles
from ..weight_files import Spec
from .format import EncodedWeight, Format, ScaledWeight
from .fp4 import Fp4Weight, halves
from .fp8 import scale_in_float32

ALGORITHMS = ("FP8", "NVFP4")
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class _Fp8Weight(ScaledWeight):
    """FP8 codes times a float32 scale of the matrix, of a row or of a block."""

    def scale_values(self, files: WeightFiles, stored: Tensor) -> Tensor:  # noqa: ARG002
        return scale_in_float32(stored)


@dataclass(frozen=True)
class _Nvfp4Weight(Fp4Weight):
    """FP4 codes times the product of an FP8 scale and the matrix's float32 scale."""

    def scale_values(self, files: WeightFiles, stored: Tensor) -> Tensor:
        assert self.whole is not None
        return stored.float() * files.tensor(self.whole).float()


class ModelOpt(Format):
    """Weights in FP8 or NVFP4."""

    beside: ClassVar[tuple[str, ...]] = (*Format.beside, "k_scale", "v_scale")

    def read(self, config: dict[str, Any]) -> str:
        """The label. Raises UnsupportedModelError for another algorithm."""
        algorithms = {str(config.get("quant_algo"))}
        if algorithms == {MIXED}:
            layers = config.get("quantized_layers") or {}
            algorithms = {str(layer.get("quant_algo")) for layer in layers.values()}
        if not algorithms or not algorithms <= set(ALGORITHMS):
            raise UnsupportedModelError(
                f"{self.name} is already quantized, by ModelOpt to "
                f"{' and '.join(sorted(algorithms)) or MIXED}; read are {' and '.join(ALGORITHMS)}"
            )
        return f"ModelOpt's {' and '.join(sorted(algorithms))}"

    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """Each weight in FP8 or of two FP4 codes in a byte that has a scale."""
        for name, spec in files.specs.items():
            scale, whole = f"{name}_scale", f"{name}_scale_2"
            if not name.endswith(".weight") or scale not in files.specs or len(spec.shape) < 2:
                continue
            if spec.dtype == torch.uint8 and whole in files.specs:
                shape = halves(spec.shape)
                blocks = self.blocks(scale, shape, files.specs[scale].shape)
                yield _Nvfp4Weight(name, Spec(shape, self.dtype), name, scale, blocks, whole=whole)
            elif spec.dtype == torch.float8_e4m3fn:
                blocks = self.blocks(scale, spec.shape, files.specs[scale].shape)
                yield _Fp8Weight(name, Spec(spec.shape, self.dtype), name, scale, blocks)
