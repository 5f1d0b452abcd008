"""Floating-point codes, in registers: from their bits to floats, and from floats to their values.

A code's exponent and mantissa stand in a float16 as they are, below a larger exponent: what differs
is the bias, a power of two, and subnormals need no case of their own. So every GPU decodes them,
with or without instructions for 8 bits.
"""

import triton
import triton.language as tl

from .codes import divide, divide_by, largest, nonzero


@triton.jit
def e4m3_floats(codes, OPERAND: tl.constexpr):
    """The values of E4M3 bytes, int8 or uint8 of any shape, as dtype OPERAND; 0x7f as 480."""
    wide = codes.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return (bits.to(tl.float16, bitcast=True) * 256.0).to(OPERAND)


@triton.jit
def e2m1_floats(packed, OPERAND: tl.constexpr):
    """The values of E2M1 codes as dtype OPERAND, both halves; packed: int8 (rows, bytes)."""
    wide = packed.to(tl.int16)
    low = ((wide & 8) << 12) | ((wide & 7) << 9)
    high = ((wide & 0x80) << 8) | ((wide & 0x70) << 5)
    first = (low.to(tl.float16, bitcast=True) * 16384.0).to(OPERAND)
    return first, (high.to(tl.float16, bitcast=True) * 16384.0).to(OPERAND)


@triton.jit
def e4m3_codes(values):
    """The E4M3 bytes of values that the format has, float32 (...), as uint8; NaN is 0x7f.

    Zero has no sign.
    """
    bits = (values * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)  # exact: 2⁻⁸
    code = tl.where(values == 0, 0, ((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F))
    return tl.where(values == values, code, 0x7F).to(tl.uint8)


@triton.jit
def e2m1_codes(values):
    """The E2M1 codes of values that the format has, float32 (...), as uint8; zero has no sign."""
    bits = (values * 0.00006103515625).to(tl.float16).to(tl.int16, bitcast=True)  # exact: 2⁻¹⁴
    return tl.where(values == 0, 0, ((bits >> 12) & 8) | ((bits >> 9) & 7)).to(tl.uint8)


@triton.jit
def word_floats(low, high, shift, BITS: tl.constexpr, OPERAND: tl.constexpr):
    """Integer codes as dtype OPERAND, from `shift` bits on in two bytes, uint8."""
    window = low.to(tl.int32) | (high.to(tl.int32) << 8)
    return (((window >> shift) & (2**BITS - 1)) - 2 ** (BITS - 1)).to(OPERAND)


@triton.jit
def scale_values(stored, SCALE: tl.constexpr):
    """Scales as float32: floats, or the values of E8M0 or of E4M3 bytes."""
    if SCALE == "e8m0":
        wide = stored.to(tl.int32)
        bits = tl.where(wide == 255, 0x7FC00000, tl.where(wide == 0, 0x400000, wide << 23))
        values = bits.to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        values = e4m3_floats(stored, tl.float32)
        values = tl.where((stored.to(tl.int32) & 0x7F) == 0x7F, float("nan"), values)
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit
def nearest(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr):
    """The values of a format that are nearest to x, float32; a NaN stays one.

    MANTISSA: bits. LOWEST: the smallest exponent. LARGEST: the largest value.
    """
    bits = x.to(tl.int32, bitcast=True)
    given = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    magnitude = tl.where(given > LARGEST, LARGEST * 1.0, given)
    binade = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, 127 + LOWEST)
    binade = tl.minimum(binade, 200)  # a NaN's: it needs no unit
    # 1.5 · 2²³ units of the binade: added and taken away, it rounds half to even.
    shift = (((binade + (23 - MANTISSA)) << 23) | 0x400000).to(tl.float32, bitcast=True)
    rounded = (magnitude + shift) - shift
    signed = rounded.to(tl.int32, bitcast=True) | (bits & -0x80000000)
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def group_scales(maximum, tensor_scale, SCALING: tl.constexpr, LARGEST: tl.constexpr):
    """The scales by the maxima, float32 (groups,), as `reference.fp_group_scales`."""
    if SCALING == "e8m0":
        exponent: tl.constexpr = 8 if LARGEST == 448 else 2
        bits = maximum.to(tl.int32, bitcast=True)
        code = tl.minimum(tl.maximum((bits >> 23) - exponent, 0), 254)
        code = tl.where(bits == 0, 127, tl.where(bits >= 0x7F800000, 255, code))
        scale = scale_values(code, SCALING)
    elif SCALING == "e4m3":
        wanted = divide(divide_by(maximum, LARGEST), tensor_scale)
        scale = (nearest(wanted, 3, -6, 448) + 0.0) * tensor_scale  # codes have no negative zero
    else:
        scale = nonzero(divide_by(maximum, LARGEST))
    return scale


@triton.jit
def fp_values(x, tensor_scale, ELEMENT: tl.constexpr, SCALING: tl.constexpr):
    """x rounded to codes and multiplied out, as `reference.fp_quantize`; arguments as below."""
    rounded, scale = rounded_and_scale(x, tensor_scale, ELEMENT, SCALING)
    return rounded * scale[:, None]


@triton.jit
def rounded_and_scale(x, tensor_scale, ELEMENT: tl.constexpr, SCALING: tl.constexpr):
    """The values of x's codes, float32 like x, and the groups' scales, float32 (groups,).

    x: float32 (groups, channels of a group); padding must be zero. ELEMENT: "e4m3" or "e2m1".
    """
    LARGEST: tl.constexpr = 448 if ELEMENT == "e4m3" else 6
    MANTISSA: tl.constexpr = 3 if ELEMENT == "e4m3" else 1
    LOWEST: tl.constexpr = -6 if ELEMENT == "e4m3" else 0
    if SCALING == "static":
        scale = tl.zeros([x.shape[0]], tl.float32) + tensor_scale
    else:
        scale = group_scales(largest(x, 1), tensor_scale, SCALING, LARGEST)
    quotient = divide(x, scale[:, None])
    if SCALING != "static":
        quotient = tl.where((scale == 0)[:, None], 0.0, quotient)
    return nearest(quotient, MANTISSA, LOWEST, LARGEST), scale
