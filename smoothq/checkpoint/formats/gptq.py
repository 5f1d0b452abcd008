"""GPTQ as GPTQModel and AutoGPTQ store it."""

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

BITS = (2, 4, 8)  # that divide a word: those of 3 bits have had more than one layout
_V1, _V2 = "gptq", "gptq_v2"


@dataclass(frozen=True)
class _GptqWeight(ScaledWeight):
    """Codes packed along the inputs, (words, out); scales and zero points are (groups, out).

    bits: of a code. added: to every word of zero points, for the first format stores them less 1.
    """

    bits: int = 4
    added: int = 0

    def code_values(self, files: WeightFiles, first: int, last: int) -> Tensor:
        words = files.part(self.codes, slice(None), slice(first, last))
        return unpack(words.T, self.bits, self.spec.shape[1]).to(torch.int16)

    def scale_grid(self, files: WeightFiles) -> Tensor:
        return files.tensor(self.scale).T

    def zero_grid(self, files: WeightFiles) -> Tensor:
        assert self.zeros is not None
        # The writer subtracts from the words, with a borrow between codes; this is the inverse.
        words = files.tensor(self.zeros) + self.added
        return unpack(words, self.bits, self.spec.shape[0]).T.to(torch.int16)


class Gptq(Format):
    """Weights of 2, 4 or 8 bits in groups of inputs, in the order of `g_idx`."""

    def read(self, config: dict[str, Any]) -> str:
        """The label. Raises UnsupportedModelError for another layout or number of bits."""
        layout = config.get("checkpoint_format") or config.get("format") or _V1
        if layout not in (_V1, _V2):
            raise UnsupportedModelError(
                f"{self.name} is already quantized, in GPTQ's layout '{layout}'; read are '{_V1}' "
                f"and '{_V2}'"
            )
        self._stored_less_1 = layout == _V1
        self._bits: int = config.get("bits", 0)
        if self._bits not in BITS:
            raise UnsupportedModelError(
                f"{self.name} is already quantized, by GPTQ in {self._bits} bits; read are "
                f"{', '.join(map(str, BITS))}"
            )
        return f"GPTQ in {self._bits} bits"

    def weights(self, files: WeightFiles) -> Iterator[EncodedWeight]:
        """Each matrix of packed words."""
        for codes, spec in files.specs.items():
            module = codes.removesuffix(".qweight")
            if module != codes:
                yield self._weight(files, module, spec)

    def _weight(self, files: WeightFiles, module: str, spec: Spec) -> EncodedWeight:
        codes, scale, zeros, order = (
            f"{module}.{leaf}" for leaf in ("qweight", "scales", "qzeros", "g_idx")
        )
        if spec.dtype != torch.int32 or not {scale, zeros} <= files.specs.keys():
            raise CheckpointError(
                f"{self.name}: '{codes}' is {spec.dtype}, with "
                f"{'' if scale in files.specs else 'no '}scales; GPTQ has int32, scales and qzeros"
            )
        groups, rows = files.specs[scale].shape
        bits = self._bits
        if order in files.specs:  # bits may differ by module
            columns = files.specs[order].shape[0]
            bits = WORD * spec.shape[0] // columns
        else:
            columns = WORD * spec.shape[0] // bits
        if bits not in BITS or spec.shape[1] != rows or columns % groups:
            raise self.misfit(scale, (rows, columns), (groups, rows))
        one_in_each_code = sum(1 << bit for bit in range(0, WORD, bits))
        return _GptqWeight(
            f"{module}.weight",
            Spec((rows, columns), self.dtype),
            codes,
            scale,
            (1, columns // groups),
            zeros,
            order if order in files.specs else None,
            bits=bits,
            added=one_in_each_code if self._stored_less_1 else 0,
        )
