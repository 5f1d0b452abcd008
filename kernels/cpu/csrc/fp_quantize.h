// Values rounded to floating-point codes and multiplied out again: `loops.h` includes this.

#pragma once

namespace smoothq {
namespace {

// A floating-point format: bits of its mantissa, its exponents, its largest value.
struct Format {
    int mantissa, lowest, highest;
    float largest;
};

constexpr Format E4M3_FORMAT{3, -6, 8, 448.0f}, E2M1_FORMAT{1, 0, 2, 6.0f};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

// The nearest value of a format, ties to the even mantissa; what is too large to the largest.
inline float nearest(float value, const Format& format) {
    const float given = from_bits(bits_of(value) & 0x7fffffffu);
    const float magnitude = given > format.largest ? format.largest : given;
    const uint32_t binade = higher_of(bits_of(magnitude) >> 23, uint32_t(127 + format.lowest));
    // 1.5 · 2^23 units of the binade: a sum with it has no fraction of a unit.
    const float shift = from_bits((binade + 23 - format.mantissa) << 23 | 0x400000u);
    return from_bits(bits_of(magnitude + shift - shift) | (bits_of(value) & 0x80000000u));
}

inline void round_all(const float* v, int64_t n, float scale, const Format& format, float* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = nearest(v[k] / scale, format) * scale;
}

// The same for few numbers, a multiple of 16: without a loop's beginning and end around each.
inline void round_few(const float* v, int64_t n, float scale, const Format& format, float* out) {
    for (int64_t k = 0; k < n; k += LANES)
        for (int64_t i = k; i < k + LANES; ++i) out[i] = nearest(v[i] / scale, format) * scale;
}

// The scale of a group by its maximum.
inline float group_scale(const FpQuantize& q, float maximum, const Format& format) {
    switch (q.scaling) {
        case FpScaling::GROUP: return nonzero(maximum / format.largest);
        case FpScaling::E8M0: {
            if (maximum == 0) return 1;
            if (!(maximum < __builtin_inff())) return E8M0.of[255];
            return E8M0.of[higher_of(int(bits_of(maximum) >> 23) - format.highest, 0)];
        }
        default: {
            const float wanted = maximum / format.largest / q.scale;
            return (nearest(wanted, E4M3_FORMAT) + 0.0f) * q.scale;  // codes have no negative zero
        }
    }
}

// The token v (K,) as out (K,).
void fp_quantize_token(const FpQuantize& q, const float* v, const Format& format, float* out) {
    if (q.scaling == FpScaling::STATIC) return round_all(v, q.width, q.scale, format, out);
    if (q.scaling == FpScaling::TOKEN) {
        const float scale = nonzero(largest(v, q.width) / format.largest);
        return round_all(v, q.width, scale, format, out);
    }
    for (int64_t at = 0; at < q.width; at += q.group) {
        const int64_t n = lower_of(q.group, q.width - at);
        const float scale = group_scale(q, largest(v + at, n), format);
        if (scale == 0)
            for (int64_t k = at; k < at + n; ++k) out[k] = 0.0f * scale;
        else if (n % LANES) round_all(v + at, n, scale, format, out + at);
        else round_few(v + at, n, scale, format, out + at);
    }
}

}  // namespace
}  // namespace smoothq
