"""The arithmetic from float32 values to codes, shared by every kernel that quantizes.

Each step is the one of `reference.py` in the same order and the same rounding: division is IEEE
division, not the device's fast one, so that codes agree to the last integer.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: added and taken away, it rounds half to even


@triton.jit
def divide(a, b):
    """a / b, rounded as IEEE does; shapes broadcast."""
    a, b = tl.broadcast(a, b)
    return tl.div_rn(a, b)


@triton.jit
def divide_by(a, NUMBER: tl.constexpr):
    """a divided by a constant, rounded as IEEE does."""
    return tl.div_rn(a, tl.full(a.shape, NUMBER, tl.float32))


@triton.jit
def nonzero(scale):
    """scale, or 1 where it is zero: a dead token keeps a finite scale."""
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, in the order of |x|: a NaN is the largest of all, and so is not lost."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest(x, axis: tl.constexpr):
    """max |x| along an axis; of a NaN, NaN."""
    return tl.max(magnitude_bits(x), axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def at_least(x, smallest):
    """max(x, smallest), where a NaN stays one."""
    return tl.maximum(x, smallest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def extreme(x, axis: tl.constexpr):
    """The value of largest magnitude along an axis; of two the negative one."""
    magnitude, lowest = largest(x, axis), tl.min(x, axis=axis)
    return tl.where(lowest == -magnitude, lowest, magnitude)


@triton.jit
def to_codes(quotient, HIGHEST: tl.constexpr):
    """Quotients as int8 codes: rounded half to even, −HIGHEST − 1 … HIGHEST; 0 for a NaN."""
    bounded = tl.minimum(tl.maximum(quotient, -HIGHEST - 1.0), HIGHEST * 1.0)
    rounded = (bounded + _ROUND) - _ROUND
    return tl.where(quotient == quotient, rounded, 0.0).to(tl.int8)


@triton.jit
def to_multipliers(quotient, LARGEST: tl.constexpr):
    """Quotients as integers in float32, rounded up: 1 … LARGEST; 1 for a NaN."""
    bounded = tl.minimum(tl.maximum(tl.ceil(quotient), 1.0), LARGEST * 1.0)
    return tl.where(quotient == quotient, bounded, 1.0)


@triton.jit
def per_token(x, clip, HIGHEST: tl.constexpr, FULL_RANGE: tl.constexpr):
    """Codes and scale () of one token, float32 of any shape; padding must be zero."""
    if FULL_RANGE:
        scale = nonzero(divide_by(extreme(x, None) * clip, -HIGHEST - 1))
    else:
        scale = nonzero(divide_by(largest(x, None) * clip, HIGHEST))
    return to_codes(divide(x, scale), HIGHEST), scale


@triton.jit
def token_groups(x, clip, HIGHEST: tl.constexpr, LARGEST: tl.constexpr):
    """Codes with their group's multiplier in them, and scale (), of one token.

    x: float32 (groups, channels of a group); padding must be zero.
    """
    extremes = extreme(x, 1)
    maxima = tl.abs(extremes) * clip
    scale = nonzero(divide_by(divide_by(largest(maxima, None), LARGEST), HIGHEST + 1))
    multiplier = to_multipliers(divide(maxima, scale * (HIGHEST + 1)), LARGEST)
    multiplier = tl.where(extremes > 0, -multiplier, multiplier)
    codes = to_codes(divide(x, (multiplier * scale)[:, None]), HIGHEST)
    return codes * multiplier.to(tl.int8)[:, None], scale
