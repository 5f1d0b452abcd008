// Numbers of 16 bits as floats. Each object has its own copy: see `loops.h`.

#pragma once

#include <cstdint>

namespace smoothq {
namespace {

inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline float from_bfloat16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

inline float from_float16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31;
    const uint32_t fraction = half & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = float(fraction) * 0x1p-24f;  // a subnormal
    return sign ? -magnitude : magnitude;
}

}  // namespace
}  // namespace smoothq
