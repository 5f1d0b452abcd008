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
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def to_codes(quotient, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Quotients as int8 codes: rounded half to even, LOWEST … HIGHEST."""
    bounded = tl.minimum(tl.maximum(quotient, LOWEST * 1.0), HIGHEST * 1.0)
    return ((bounded + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def per_token(x, clip, HIGHEST: tl.constexpr, LOWEST: tl.constexpr):
    """Codes and scale () of one token, float32 (ROWS, COLUMNS); padding must be zero."""
    scale = nonzero(divide_by(tl.max(tl.abs(x)) * clip, HIGHEST))
    return to_codes(divide(x, scale), LOWEST, HIGHEST), scale


@triton.jit
def token_groups(x, clip, HIGHEST: tl.constexpr, LARGEST: tl.constexpr):
    """Codes with their group's multiplier in them, and scale (), of one token.

    x: float32 (groups, channels of a group); padding must be zero.
    """
    maxima = tl.max(tl.abs(x), axis=1) * clip
    base = divide_by(tl.max(maxima), LARGEST)
    base = tl.where(divide_by(base, HIGHEST) > 0, base, 1.0)
    multiplier = tl.ceil(divide(maxima, base))
    multiplier = tl.minimum(tl.maximum(multiplier, 1.0), LARGEST * 1.0)
    scale = divide_by(base, HIGHEST)
    codes = to_codes(divide(x, (multiplier * scale)[:, None]), -HIGHEST, HIGHEST)
    return codes * multiplier.to(tl.int8)[:, None], scale
