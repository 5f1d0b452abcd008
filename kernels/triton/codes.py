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
def extreme(x, axis: tl.constexpr):
    """The value of largest magnitude along an axis; of two the negative one."""
    highest, lowest = tl.max(x, axis=axis), tl.min(x, axis=axis)
    return tl.where(highest > -lowest, highest, lowest)


@triton.jit
def to_codes(quotient, HIGHEST: tl.constexpr):
    """Quotients as int8 codes: rounded half to even, −HIGHEST − 1 … HIGHEST."""
    bounded = tl.minimum(tl.maximum(quotient, -HIGHEST - 1.0), HIGHEST * 1.0)
    return ((bounded + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def per_token(x, clip, HIGHEST: tl.constexpr, FULL_RANGE: tl.constexpr):
    """Codes and scale () of one token, float32 of any shape; padding must be zero."""
    if FULL_RANGE:
        scale = nonzero(divide_by(extreme(x, None) * clip, -HIGHEST - 1))
    else:
        scale = nonzero(divide_by(tl.max(tl.abs(x)) * clip, HIGHEST))
    return to_codes(divide(x, scale), HIGHEST), scale


@triton.jit
def token_groups(x, clip, HIGHEST: tl.constexpr, LARGEST: tl.constexpr):
    """Codes with their group's multiplier in them, and scale (), of one token.

    x: float32 (groups, channels of a group); padding must be zero.
    """
    extremes = extreme(x, 1)
    maxima = tl.abs(extremes) * clip
    scale = nonzero(divide_by(divide_by(tl.max(maxima), LARGEST), HIGHEST + 1))
    multiplier = tl.ceil(divide(maxima, scale * (HIGHEST + 1)))
    multiplier = tl.minimum(tl.maximum(multiplier, 1.0), LARGEST * 1.0)
    multiplier = tl.where(extremes > 0, -multiplier, multiplier)
    codes = to_codes(divide(x, (multiplier * scale)[:, None]), HIGHEST)
    return codes * multiplier.to(tl.int8)[:, None], scale
