"""The formats of compressed-tensors, which llm-compressor and smoothq's exports write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ...kernels.formats import E8M0_BIAS
from ..stored import WeightFiles
from ..weight_files import Spec
from .bits import WORD, unpack
from .format import Blocks, EncodedWeight, Format, ScaledWeight
from .fp4 import Fp4Weight, halves

METHOD = "compressed-tensors"
READ = {
    "int-quantized": "integers",
    "naive-quantized": "integers or FP8",
    "float-quantized": "FP8",
    "pack-quantized": "packed integers",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp8-quantized": "MXFP8",
}
_PACKED, _ZEROS, _ORDER = "weight_packed", "weight_zero_point", "weight_g_idx"
_SHAPE = ".weight_shape"


@dataclass(frozen=True)
class _PlainWeight(ScaledWeight):
    """Int8 or FP8 codes, one an element."""

    def scale_values(self, files: WeightFiles, stored: Tensor) -> Tensor:  # noqa: ARG002
        return _power_of_two(stored) if stored.dtype == torch.uint8 else stored


@dataclass(frozen=True)
class _PackedWeight(ScaledWeight):
    """Integers of a few bits, packed along the inputs, and zero points along the outputs.

    bits: of a code, of which the unsigned form is stored.
    """

    bits: int = 4

    def code_values(self, files: WeightFiles, first: int, last: int) -> Tensor:
        words = super().code_values(files, first, last)
        return self._signed(unpack(words, self.bits, self.spec.shape[-1]))

    def zero_grid(self, files: WeightFiles) -> Tensor:
        assert self.zeros is not None
        words = files.tensor(self.zeros).transpose(-2, -1)
        return self._signed(unpack(words, self.bits, self.spec.shape[-2])).transpose(-2, -1)

    def _signed(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int16) - (1 << self.bits - 1)


@dataclass(frozen=True)
class _Fp4Weight(Fp4Weight):
    """NVFP4, whose FP8 scales are divided by the matrix's, or MXFP4, which has exponents."""

    def scale_values(self, files: WeightFiles, stored: Tensor) -> Tensor:
        if stored.dtype == torch.uint8:
            return _power_of_two(stored)
        scale = stored.to(torch.bfloat16)
        return scale if self.whole is None else scale / files.tensor(self.whole)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Bfloat16 scales of E8M0 exponents."""
    powers: Tensor = 2.0 ** (exponents.to(torch.int32) - E8M0_BIAS).to(torch.bfloat16)
    return powers


class CompressedTensors(Format):
    """Weights in any of the formats of `READ`, which may differ by module."""

    beside: ClassVar[tuple[str, ...]] = (
        *(*Format.beside, "input_zero_point", "output_scale", "output_zero_point"),
        _SHAPE.removeprefix("."),
    )

    def read(self, config: dict[str, Any]) -> str:
        """The label. Raises UnsupportedModelError for a format or transform that is not decoded."""
        groups = config.get("config_groups") or {}
        schemes = [group for group in groups.values() if isinstance(group, dict)]
        named = [scheme.get("format") or config.get("format") for scheme in schemes]
        formats = dict.fromkeys(named or [config.get("format")])
        unread = [str(name) for name in formats if name not in READ]
        sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            unread.append(f"{sparsity} (sparsity)")
        if (config.get("transform_config") or {}).get("config_groups"):
            unread.append("transforms that run beside the weights")
        if unread:
            raise UnsupportedModelError(
                f"{self.name} is already quantized, by compressed-tensors as {', '.join(unread)}; "
                f"read are {', '.join(READ)}: quantize the float model"
            )
        weights = [scheme.get("weights") or {} for scheme in schemes]
        self._bits: list[int] = sorted({one["num_bits"] for one in weights if "num_bits" in one})
        self._known: list[Blocks] = [
            tuple(one["block_structure"]) for one in weights if one.get("block_structure")
        ]
        return f"compressed-tensors' {' and '.join(READ[str(name)] for name in formats)}"

    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """Each weight, packed or one code an element, that has a scale."""
        shapes = files.together(name for name in files.specs if name.endswith(_SHAPE))
        for codes, spec in files.specs.items():
            module, _, leaf = codes.rpartition(".")
            scale = f"{module}.weight_scale"
            if leaf not in ("weight", _PACKED) or scale not in files.specs:
                continue
            if leaf == "weight" and spec.dtype not in (torch.int8, torch.float8_e4m3fn):
                continue  # stored as a float beside its scale
            yield self._weight(files.specs, module, codes, shapes.get(f"{module}{_SHAPE}"))

    def _weight(
        self, stored: Mapping[str, Spec], module: str, codes: str, unpacked: Tensor | None
    ) -> EncodedWeight:
        """The weight of a module; unpacked: its shape, stored beside one in words."""
        spec, scale = stored[codes], f"{module}.weight_scale"
        zeros, order = (
            name if name in stored else None
            for name in (f"{module}.{_ZEROS}", f"{module}.{_ORDER}")
        )
        packed = codes.endswith(_PACKED)
        shape, bits = spec.shape, 8
        if packed and spec.dtype == torch.uint8:
            shape = halves(spec.shape)
        elif packed:
            if unpacked is None:
                raise CheckpointError(
                    f"{self.name}: '{codes}' has no '{module}{_SHAPE}' beside it; the checkpoint "
                    "is incomplete"
                )
            shape = (*spec.shape[:-1], int(unpacked[-1]))
            bits = self._bits_of(codes, spec.shape[-1], shape[-1])
        decoded = Spec(shape, self.dtype)
        blocks = self.blocks(scale, shape, stored[scale].shape, *self._known)
        name = f"{module}.weight"
        if packed and spec.dtype == torch.uint8:
            whole = f"{module}.weight_global_scale"
            return _Fp4Weight(
                name,
                decoded,
                codes,
                scale,
                blocks,
                computed=torch.bfloat16,
                whole=whole if whole in stored else None,
            )
        if packed:
            return _PackedWeight(name, decoded, codes, scale, blocks, zeros, order, bits=bits)
        return _PlainWeight(name, decoded, codes, scale, blocks, zeros, order)

    def _bits_of(self, codes: str, words: int, columns: int) -> int:
        """The bits of a code by how many words hold a row."""
        for bits in self._bits:
            if -(-columns * bits // WORD) == words:
                return bits
        raise CheckpointError(
            f"{self.name}: '{codes}' has {words} words for {columns} columns, which is none of "
            f"{', '.join(map(str, self._bits))} bits without gaps"
        )
