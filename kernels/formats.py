"""Number formats of a few bits: the values that codes stand for, and the code nearest to a number.

Floating-point codes are sign, exponent and mantissa, as the OCP defines them for microscaling (MX
specification 1.0, section 5.3) and for 8 bits (FP8 specification 1.0). Their magnitudes, read as
integers, stand in the order of the values: a code's *rank* is that integer with the code's sign,
so that neighbouring values have neighbouring ranks, as integers have. A value is rounded to the
nearest, ties to the even mantissa, and what is too large to the largest: there is no infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E8M0_BIAS = 127  # byte b of a power-of-two scale is 2^(b - 127); 255 is NaN
E8M0_NAN = 255


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format of at most 8 bits.

    Attributes:
        name: as the OCP writes it, in lower case.
        bits: of a code.
        mantissa: bits of the mantissa.
        bias: of the exponent.
        highest: the largest rank.
    """

    name: str
    bits: int
    mantissa: int
    bias: int
    highest: int

    @property
    def largest(self) -> float:
        """The largest value: 6 in E2M1, 448 in E4M3."""
        exponent, mantissa = divmod(self.highest, 2**self.mantissa)
        return float((1 + mantissa / 2**self.mantissa) * 2.0 ** (exponent - self.bias))

    @property
    def exponent(self) -> int:
        """The exponent of the largest value, floor(log2 v): 2 in E2M1, 8 in E4M3."""
        return (self.highest >> self.mantissa) - self.bias

    def ranks(self, x: Tensor) -> Tensor:
        """The ranks of the values nearest to x, float (...), in x's dtype; NaN for NaN."""
        magnitude = x.abs().clamp(max=self.largest)
        steps, first = self._in_binade(magnitude)
        rank = steps.round_() + first
        return torch.where(magnitude.isnan(), magnitude, rank.copysign_(x))

    def positions(self, x: Tensor) -> Tensor:
        """Where x, float (...), lies among the ranks: evenly between one value and the next."""
        steps, first = self._in_binade(x.abs())
        positions: Tensor = (steps + first).copysign_(x)
        return positions

    def _in_binade(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Steps into the binade of a magnitude, and the rank that none would have; both float.

        Within a binade the values are evenly spaced, and so are the ranks.
        """
        exponent = torch.frexp(magnitude).exponent - 1
        exponent = torch.where(magnitude == 0, 1 - self.bias, exponent.clamp_(min=1 - self.bias))
        unit = torch.ldexp(torch.ones_like(magnitude), exponent - self.mantissa)
        first = (exponent + self.bias - 1).to(magnitude.dtype) * 2**self.mantissa
        return magnitude / unit, first

    def values(self, ranks: Tensor) -> Tensor:
        """The values of ranks, float (...), in the same dtype."""
        exponent = (ranks.abs() / 2**self.mantissa).floor_().clamp_(min=1) - 1
        steps = ranks.abs() - exponent * 2**self.mantissa
        unit = torch.exp2(exponent + (1 - self.bias - self.mantissa))
        values: Tensor = (steps * unit).copysign_(ranks)
        return values

    def codes(self, ranks: Tensor) -> Tensor:
        """The codes of ranks, int8 (...), as uint8: sign, exponent, mantissa."""
        sign = (ranks < 0).to(torch.uint8) << (self.bits - 1)
        return ranks.abs().to(torch.uint8) | sign

    def ranks_of(self, codes: Tensor) -> Tensor:
        """The ranks of codes, uint8 (...), as int8; the negative zero's is 0."""
        sign = 1 << (self.bits - 1)
        magnitude = (codes & (sign - 1)).to(torch.int8)
        return torch.where(codes & sign != 0, -magnitude, magnitude)


E2M1 = FloatFormat("e2m1", bits=4, mantissa=1, bias=1, highest=7)
E4M3 = FloatFormat("e4m3", bits=8, mantissa=3, bias=7, highest=126)
FORMATS = {form.name: form for form in (E2M1, E4M3)}


def power_of_two(maximum: Tensor, form: FloatFormat) -> Tensor:
    """The E8M0 scales of groups: floor(log2 max) less the exponent of the largest value.

    They are 2⁰ where the maximum is zero, and NaN where it is NaN or infinite. Source: OCP MX
    specification 1.0, section 6.3.

    Args:
        maximum: of each group's magnitudes, float32 (...).
        form: of the values.

    Returns:
        Bytes, uint8 (...).
    """
    exponent = torch.frexp(maximum).exponent - 1 - form.exponent
    code = (exponent + E8M0_BIAS).clamp_(0, E8M0_NAN - 1)
    code = torch.where(maximum == 0, E8M0_BIAS, code)
    return torch.where(maximum.isfinite(), code, E8M0_NAN).to(torch.uint8)


def powers_of_two(codes: Tensor) -> Tensor:
    """The values of E8M0 bytes, uint8 (...), as float32."""
    values = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.int() - E8M0_BIAS)
    return torch.where(codes == E8M0_NAN, torch.nan, values)


def e4m3_bytes(x: Tensor) -> Tensor:
    """The E4M3 bytes nearest to x, float32 (...), as uint8; NaN is 0x7f."""
    ranks = E4M3.ranks(x)
    codes = E4M3.codes(ranks.nan_to_num(0.0).to(torch.int8))
    return torch.where(ranks.isnan(), 0x7F, codes)


def e4m3_values(codes: Tensor) -> Tensor:
    """The values of E4M3 bytes, uint8 (...), as float32."""
    values = E4M3.values(E4M3.ranks_of(codes).float())
    return torch.where(codes & 0x7F == 0x7F, torch.nan, values)
