// Numbers of 16 and of 8 bits as floats. Each object has its own copy: see `loops.h`.

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

// The values of a format's 256 bytes. They are constants: nothing of an instruction set runs before
// it is chosen.
struct ByteValues {
    float of[256];
};

// Powers of two, 2^(b - 127); 255 is NaN.
constexpr ByteValues e8m0_values() {
    ByteValues values{};
    values.of[0] = 0x1p-127f;
    for (int b = 1; b < 255; ++b) values.of[b] = 2 * values.of[b - 1];
    values.of[255] = __builtin_nanf("");
    return values;
}

// Sign, 4 bits of exponent, 3 of mantissa; 0x7f and 0xff are NaN.
constexpr ByteValues e4m3_values() {
    ByteValues values{};
    for (int b = 0; b < 128; ++b) {
        float value = (b & 7) + (b < 8 ? 0 : 8);
        for (int exponent = 1; exponent < b >> 3; ++exponent) value *= 2;
        values.of[b] = b == 127 ? __builtin_nanf("") : value * 0x1p-9f;
        values.of[b + 128] = -values.of[b];
    }
    return values;
}

constexpr ByteValues E8M0 = e8m0_values(), E4M3 = e4m3_values();

}  // namespace
}  // namespace smoothq
