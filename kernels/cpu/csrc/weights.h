// Rows of a weight's codes as floats, 64 at a time: `loops.h` includes this.

#pragma once

namespace smoothq {
namespace {

// Rows of E4M3 bytes.
struct E4m3 {
    const int8_t* codes;
    int64_t width;
};

// Rows of E2M1 codes, packed as `Packed`.
struct E2m1 {
    Packed packed;
};

// Rows of codes of 2, 3, 5, 6 or 7 bits, one after the other in the bits of words.
template <int BITS>
struct Words {
    static constexpr int HALF = 1 << (BITS - 1), MASK = 2 * HALF - 1;
    static constexpr int BYTES = 2 * BITS;  // of 16 codes
    const int32_t* codes;
    int64_t width;

    // The bytes of a row's codes from k on, a multiple of 16.
    const uint8_t* from(int64_t row, int64_t k) const {
        const int32_t* words = codes + row * ((width * BITS + 31) / 32);
        return reinterpret_cast<const uint8_t*>(words) + k / LANES * BYTES;
    }
};

constexpr float E2M1_VALUES[16] = {0, 0.5f,  1,  1.5f,  2,  3,  4,  6,
                                   0, -0.5f, -1, -1.5f, -2, -3, -4, -6};

inline float weight_at(const E4m3& w, int64_t row, int64_t k) {
    const uint8_t code = uint8_t(w.codes[row * w.width + k]);
    if ((code & 127) == 127) return code == 127 ? 480.0f : -480.0f;  // no NaN among weights
    return E4M3.of[code];
}

inline float weight_at(const E2m1& w, int64_t row, int64_t k) {
    return E2M1_VALUES[w.packed.at(row, k) & 15];
}

template <int BITS>
inline int weight_at(const Words<BITS>& w, int64_t row, int64_t k) {
    const int64_t bit = k % LANES * BITS;
    const uint8_t* byte = w.from(row, k) + bit / 8;
    const int both = bit % 8 + BITS > 8 ? byte[0] | byte[1] << 8 : byte[0];
    return (both >> bit % 8 & w.MASK) - w.HALF;
}

// Where 16 codes stand in their bytes: the two bytes of each, and the shift in them.
template <int BITS>
struct Places {
    alignas(64) uint8_t bytes[LANES][4];
    alignas(64) int32_t shift[LANES];

    static constexpr Places all() {
        Places places{};
        for (int i = 0; i < LANES; ++i) {
            const int bit = i * BITS;
            for (int j = 0; j < 4; ++j) places.bytes[i][j] = j < 2 ? uint8_t(bit / 8 + j) : 255;
            places.shift[i] = bit % 8;
        }
        return places;
    }
};

template <int BITS>
constexpr Places<BITS> PLACES = Places<BITS>::all();

#if defined(__AVX512BW__)

inline void codes_as_floats(const E4m3& w, int64_t row, int64_t k, Floats* out) {
    const __m256i* bytes = reinterpret_cast<const __m256i*>(w.codes + row * w.width + k);
    for (int i = 0; i < 2; ++i) {
        // As float16, whose exponent has a bit more and a bias that is larger by 8.
        const __m512i high =
            _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes + i)), 8);
        const __m512i halves =
            _mm512_and_si512(_mm512_srai_epi16(high, 1), _mm512_set1_epi16(int16_t(0xbfff)));
        out[2 * i] = Floats(_mm512_cvtph_ps(_mm512_castsi512_si256(halves))) * 256.0f;
        out[2 * i + 1] = Floats(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))) * 256.0f;
    }
}

inline void codes_as_floats(const E2m1& w, int64_t row, int64_t k, Floats* out) {
    nibbles_as_floats(w.packed, row, k, _mm512_loadu_ps(E2M1_VALUES), out);
}

template <int BITS>
inline void codes_as_floats(const Words<BITS>& w, int64_t row, int64_t k, Floats* out) {
    const __m512i places = _mm512_load_si512(PLACES<BITS>.bytes);
    const __m512i shift = _mm512_load_si512(PLACES<BITS>.shift);
    const uint8_t* bytes = w.from(row, k);
    for (int i = 0; i < 4; ++i, bytes += w.BYTES) {
        const __m512i held =
            _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8((1 << w.BYTES) - 1, bytes));
        const __m512i pair = _mm512_srlv_epi32(_mm512_shuffle_epi8(held, places), shift);
        const __m512i code = _mm512_and_si512(pair, _mm512_set1_epi32(w.MASK));
        out[i] = Floats(_mm512_cvtepi32_ps(code)) - float(w.HALF);
    }
}

#elif defined(__AVX2__)

inline void codes_as_floats(const E4m3& w, int64_t row, int64_t k, Floats* out) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(w.codes + row * w.width + k);
    for (int i = 0; i < 4; ++i) {
        // As float16, whose exponent has a bit more and a bias that is larger by 8.
        const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(bytes + i)), 8);
        const __m256i halves =
            _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16(int16_t(0xbfff)));
        const __m256 values[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                                  _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
        __builtin_memcpy(&out[i], values, sizeof out[i]);
        out[i] *= 256.0f;
    }
}

inline void codes_as_floats(const E2m1& w, int64_t row, int64_t k, Floats* out) {
    const __m128i doubled =
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    nibbles_as_floats(w.packed, row, k, doubled, out);
    for (int i = 0; i < 4; ++i) out[i] *= 0.5f;
}

template <int BITS>
inline void codes_as_floats(const Words<BITS>& w, int64_t row, int64_t k, Floats* out) {
    const __m256i mask = _mm256_set1_epi32(w.MASK);
    const uint8_t* bytes = w.from(row, k);
    for (int i = 0; i < 4; ++i, bytes += w.BYTES) {
        alignas(16) uint8_t few[16] = {};
        __builtin_memcpy(few, bytes, w.BYTES);
        const __m256i held = _mm256_broadcastsi128_si256(
            _mm_load_si128(reinterpret_cast<const __m128i*>(few)));
        __m256 values[2];
        for (int half = 0; half < 2; ++half) {
            const auto part = [&](const void* from) {
                return _mm256_load_si256(static_cast<const __m256i*>(from) + half);
            };
            const __m256i pair = _mm256_shuffle_epi8(held, part(PLACES<BITS>.bytes));
            values[half] = _mm256_cvtepi32_ps(_mm256_and_si256(
                _mm256_srlv_epi32(pair, part(PLACES<BITS>.shift)), mask));
        }
        __builtin_memcpy(&out[i], values, sizeof out[i]);
        out[i] -= float(w.HALF);
    }
}

#else

inline void codes_as_floats(const E4m3& w, int64_t row, int64_t k, Floats* out) {
    const int8_t* bytes = w.codes + row * w.width + k;
    for (int64_t j = 0; j < BLOCK; ++j) {
        // As float32 with the exponent's own bias; a subnormal is then 2^-6 too much, halved.
        const uint32_t code = uint8_t(bytes[j]), magnitude = code & 127;
        const float value = from_bits((magnitude << 20) + (120u << 23));
        const float right = magnitude < 8 ? 2 * value - 0x1p-6f : value;
        out[j / LANES][j % LANES] = code & 128 ? -right : right;
    }
}

inline void codes_as_floats(const E2m1& w, int64_t row, int64_t k, Floats* out) {
    const uint8_t* bytes = w.packed.codes + row * w.packed.stride + k / 2;
    for (int64_t j = 0; j < BLOCK / 2; ++j) {
        out[j / LANES][j % LANES] = E2M1_VALUES[bytes[j] & 15];
        out[2 + j / LANES][j % LANES] = E2M1_VALUES[bytes[j] >> 4];
    }
}

template <int BITS>
inline void codes_as_floats(const Words<BITS>& w, int64_t row, int64_t k, Floats* out) {
    for (int64_t j = 0; j < BLOCK; ++j) out[j / LANES][j % LANES] = float(weight_at(w, row, k + j));
}

#endif

Packed packed_of(const uint8_t* codes, const int8_t* multiplier, int64_t groups, int64_t width) {
    return {codes, multiplier, width, (width + 1) / 2, width / groups, groups};
}

// Calls f with the codes of a weight, without their multipliers.
template <class F>
void with_codes(const ScaledWeight& w, const F& f) {
    if (w.element == Element::E4M3) return f(E4m3{w.bytes, w.width});
    if (w.element == Element::E2M1) return f(E2m1{packed_of(w.packed, nullptr, 1, w.width)});
    if (w.bytes) return f(Bytewise{w.bytes, w.width, w.width});
    if (w.packed) return f(packed_of(w.packed, nullptr, 1, w.width));
    switch (w.bits) {
        case 2: return f(Words<2>{w.words, w.width});
        case 3: return f(Words<3>{w.words, w.width});
        case 5: return f(Words<5>{w.words, w.width});
        case 6: return f(Words<6>{w.words, w.width});
        default: return f(Words<7>{w.words, w.width});
    }
}

}  // namespace
}  // namespace smoothq
