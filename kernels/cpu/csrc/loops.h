// The loops of the operators, for one instruction set: `isa.cpp` includes this and is compiled once
// for each.
//
// Nothing of the C++ library is used: an inline function of it that is not inlined would stand in
// every object under one name, and the linker keeps one of them, perhaps one with instructions that
// the processor at hand does not have. All that is here is local to its object.

#include <cstdint>
#include <cstdlib>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "numbers.h"
#include "table.h"

namespace smoothq {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

template <class T>
inline T lower_of(T a, T b) { return b < a ? b : a; }

template <class T>
inline T higher_of(T a, T b) { return a < b ? b : a; }

// Memory of `count` numbers for a while, not initialised, on a boundary of 64 bytes.
template <class T>
struct Buffer {
    explicit Buffer(int64_t count)
        : at(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
        if (!at) std::abort();
    }
    ~Buffer() { std::free(at); }
    Buffer(const Buffer&) = delete;
    T& operator[](int64_t i) const { return at[i]; }
    T* data() const { return at; }

    T* const at;
};

// ---- numbers ------------------------------------------------------------------------------------

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(void* out, Type type, int64_t at, float value) {
    if (type == Type::FLOAT32) static_cast<float*>(out)[at] = value;
    else static_cast<uint16_t*>(out)[at] = to_bfloat16(value);
}

inline float load(const void* in, Type type, int64_t at) {
    switch (type) {
        case Type::FLOAT32: return static_cast<const float*>(in)[at];
        case Type::BFLOAT16: return from_bfloat16(static_cast<const uint16_t*>(in)[at]);
        case Type::E8M0: return E8M0.of[static_cast<const uint8_t*>(in)[at]];
        default: return E4M3.of[static_cast<const uint8_t*>(in)[at]];
    }
}

// A row in float32: itself, or converted into `scratch`.
const float* row_of(const void* x, Type type, int64_t row, int64_t width, float* scratch) {
    if (type == Type::FLOAT32) return static_cast<const float*>(x) + row * width;
    const uint16_t* halves = static_cast<const uint16_t*>(x) + row * width;
    for (int64_t k = 0; k < width; ++k) scratch[k] = from_bfloat16(halves[k]);
    return scratch;
}

inline Floats floats_at(const float* from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

inline void put(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }

inline Floats all(float value) { return Floats{} + value; }

// a · b + c, rounded once where the processor can.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

inline float sum(Floats value) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += value[i];
    return total;
}

// ---- rotation -----------------------------------------------------------------------------------

// A rotation with its left factor in floats.
struct Factors {
    explicit Factors(const Rotation& r)
        : signs(r.signs), left(r.order * r.order), order(r.order), right(r.right) {
        for (int64_t i = 0; i < order * order; ++i) left[i] = r.left[i];
    }

    const int8_t* signs;
    Buffer<float> left;
    int64_t order, right;
};

template <int STRIDE>
inline Floats butterfly(Floats v) {
    Floats partner, sign;
    for (int i = 0; i < LANES; ++i) {
        partner[i] = v[i ^ STRIDE];
        sign[i] = i & STRIDE ? -1.0f : 1.0f;
    }
    return partner + sign * v;
}

// v · Sylvester's matrix of order n, in place.
void sylvester(float* v, int64_t n) {
    int64_t half = 1;
    if (n >= LANES) {
        for (int64_t i = 0; i < n; i += LANES) {
            Floats t = floats_at(v + i);
            put(v + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(t)))));
        }
        half = LANES;
    }
    for (; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; ++j) {
                const float a = v[j], b = v[j + half];
                v[j] = a + b;
                v[j + half] = a - b;
            }
}

// Rows m … m + 3 of leftᵀ · block, columns c … c + 16 · C, times `factor`.
template <int C>
inline void left_tile(const Factors& r, const float* block, float* out, int64_t m, int64_t c,
                      float factor) {
    Floats total[4][C] = {};
    for (int64_t k = 0; k < r.order; ++k) {
        const float* signs = &r.left[k * r.order + m];
        for (int i = 0; i < C; ++i) {
            const Floats x = floats_at(block + k * r.right + c + LANES * i);
            for (int j = 0; j < 4; ++j) total[j][i] += signs[j] * x;
        }
    }
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < C; ++i)
            put(out + (m + j) * r.right + c + LANES * i, total[j][i] * factor);
}

void rotate_token(const Factors& r, const float* x, float* out, float* scratch, int64_t width) {
    const int64_t size = r.order * r.right;
    const float factor = float(1.0 / __builtin_sqrt(double(size)));
    for (int64_t at = 0; at < width; at += size) {
        float* block = r.order > 1 ? scratch : out + at;
        for (int64_t k = 0; k < size; ++k) block[k] = x[at + k] * r.signs[at + k];
        for (int64_t k = 0; k < size; k += r.right) sylvester(block + k, r.right);
        if (r.order == 1) {
            for (int64_t k = 0; k < size; ++k) block[k] *= factor * r.left[0];
        } else if (r.order % 4 == 0 && r.right % LANES == 0) {
            for (int64_t m = 0; m < r.order; m += 4) {
                int64_t c = 0;
                for (; c + 4 * LANES <= r.right; c += 4 * LANES)
                    left_tile<4>(r, block, out + at, m, c, factor);
                for (; c < r.right; c += LANES) left_tile<1>(r, block, out + at, m, c, factor);
            }
        } else {
            for (int64_t k = 0; k < size; ++k) out[at + k] = 0.0f;
            for (int64_t m = 0; m < r.order; ++m)
                for (int64_t k = 0; k < r.order; ++k)
                    for (int64_t c = 0; c < r.right; ++c)
                        out[at + m * r.right + c] +=
                            factor * r.left[k * r.order + m] * block[k * r.right + c];
        }
    }
}

// ---- quantizers ---------------------------------------------------------------------------------

// max |v|, by the bits: a NaN is the largest of all, and so is not lost.
inline float largest(const float* v, int64_t n) {
    uint32_t most = 0;
    for (int64_t k = 0; k < n; ++k) {
        uint32_t bits;
        __builtin_memcpy(&bits, v + k, 4);
        most = higher_of(most, bits & 0x7fffffffu);
    }
    float value;
    __builtin_memcpy(&value, &most, 4);
    return value;
}

// Every lane the larger, or lower, of itself and of the lane that lies STRIDE away.
template <int STRIDE>
inline Bits wider(Bits v) {
    Bits partner;
    for (int i = 0; i < LANES; ++i) partner[i] = v[i ^ STRIDE];
    return partner > v ? partner : v;
}

template <int STRIDE>
inline Floats lower(Floats v) {
    Floats partner;
    for (int i = 0; i < LANES; ++i) partner[i] = v[i ^ STRIDE];
    return partner < v ? partner : v;
}

// The value of largest magnitude; of two the negative one.
inline float extreme(const float* v, int64_t n) {
    float lowest = v[0];
#pragma omp simd reduction(min : lowest)
    for (int64_t k = 0; k < n; ++k) lowest = lower_of(lowest, v[k]);
    const float magnitude = largest(v, n);
    return lowest == -magnitude ? lowest : magnitude;
}

// `extreme` of every group of a token.
void extremes_of(const float* v, int64_t groups, int64_t group, float* out) {
    if (group % LANES) {
        for (int64_t g = 0; g < groups; ++g) out[g] = extreme(v + g * group, group);
        return;
    }
    for (int64_t g = 0; g < groups; ++g) {
        Bits most = {};
        Floats lowest = floats_at(v + g * group);
        for (int64_t k = g * group; k < (g + 1) * group; k += LANES) {
            const Floats x = floats_at(v + k);
            Bits bits;
            __builtin_memcpy(&bits, &x, sizeof bits);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
            lowest = x < lowest ? x : lowest;
        }
        most = wider<1>(wider<2>(wider<4>(wider<8>(most))));
        lowest = lower<1>(lower<2>(lower<4>(lower<8>(lowest))));
        float magnitude;
        const uint32_t bits = most[0];
        __builtin_memcpy(&magnitude, &bits, 4);
        out[g] = lowest[0] == -magnitude ? lowest[0] : magnitude;
    }
}

inline float nonzero(float scale) { return scale == 0 ? 1.0f : scale; }

// round(v / scale), clamped, times `factor`; 0 for a NaN.
inline int8_t code_of(float v, float scale, float low, float high, int factor) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 · 2^23: a sum with it has no fraction
    const float quotient = v / scale, clamped = lower_of(higher_of(quotient, low), high);
    const float rounded = clamped + TO_INTEGER - TO_INTEGER;
    return int8_t(int(quotient == quotient ? rounded : 0.0f) * factor);
}

inline void codes_of(const float* v, int64_t n, float scale, int highest, int factor, int8_t* out) {
    const float low = float(-highest - 1), high = float(highest);
    for (int64_t k = 0; k < n; ++k) out[k] = code_of(v[k], scale, low, high, factor);
}

// The same for few numbers, a multiple of 16: without a loop's beginning and end around each.
inline void few_codes_of(const float* v, int64_t n, float scale, int highest, int factor,
                         int8_t* out) {
    const float low = float(-highest - 1), high = float(highest);
    for (int64_t k = 0; k < n; k += LANES)
        for (int64_t i = k; i < k + LANES; ++i) out[i] = code_of(v[i], scale, low, high, factor);
}

// The token v (K,) into codes; returns its scale. scratch: (K,), may be v.
float quantize_token(const Quantizer& q, const float* v, int64_t width, int8_t* codes,
                     float* scratch) {
    const int highest = (1 << (q.bits - 1)) - 1;
    switch (q.mode) {
        case Mode::STATIC:
            codes_of(v, width, q.scale, highest, 1, codes);
            return q.scale;
        case Mode::TOKEN: {
            const float scale = nonzero(largest(v, width) * q.clip / highest);
            codes_of(v, width, scale, highest, 1, codes);
            return scale;
        }
        case Mode::FULL_RANGE: {
            const float scale = nonzero(extreme(v, width) * q.clip / -(highest + 1));
            codes_of(v, width, scale, highest, 1, codes);
            return scale;
        }
        case Mode::SMOOTHED: {
            for (int64_t k = 0; k < width; ++k) scratch[k] = v[k] / q.multiplier[k];
            const float scale = nonzero(largest(scratch, width) * q.clip / highest);
            codes_of(scratch, width, scale, highest, 1, codes);
            for (int64_t k = 0; k < width; ++k) codes[k] = int8_t(codes[k] * q.multiplier[k]);
            return scale;
        }
        default: {
            const int64_t groups = width / q.group;
            const Buffer<float> extremes(groups);
            const Buffer<int> factors(groups);
            extremes_of(v, groups, q.group, extremes.data());
            const float base = largest(extremes.data(), groups) * q.clip / q.largest;
            const float scale = nonzero(base / (highest + 1));
            const float step = scale * (highest + 1);
            for (int64_t g = 0; g < groups; ++g) {
                const float steps = __builtin_ceilf(__builtin_fabsf(extremes[g]) * q.clip / step);
                const int m = int(lower_of(higher_of(steps == steps ? steps : 1.0f, 1.0f),
                                           float(q.largest)));
                factors[g] = extremes[g] > 0 ? -m : m;
            }
            const auto round = q.group % LANES ? codes_of : few_codes_of;
            for (int64_t g = 0; g < groups; ++g)
                round(v + g * q.group, q.group, factors[g] * scale, highest, factors[g],
                      codes + g * q.group);
            return scale;
        }
    }
}

}  // namespace
}  // namespace smoothq

#include "fp_quantize.h"

namespace smoothq {
namespace {

// ---- integer products of few tokens -------------------------------------------------------------

// Rows that some tokens meet at once: the fewer, the steadier memory is read.
constexpr int rows_beside(int tokens) { return tokens <= 2 ? 1 : 4; }

// Rows of a weight as bytes.
struct Bytewise {
    const int8_t* codes;
    int64_t width, group;
};

// Rows of 4-bit codes as `unpack_int4` has them, times an integer multiplier a group.
struct Packed {
    const uint8_t* codes;
    const int8_t* multiplier;  // (N, groups), or null
    int64_t width, stride, group, groups;

    // Code k of a row, its multiplier in it.
    int at(int64_t row, int64_t k) const {
        const int64_t first = k / BLOCK * BLOCK, columns = lower_of(BLOCK, width - first);
        const int64_t half = (columns + 1) / 2, j = k - first;
        const uint8_t byte = codes[row * stride + first / 2 + j % half];
        const int code = ((j < half ? byte & 15 : byte >> 4) ^ 8) - 8;
        return multiplier ? code * multiplier[row * groups + k / group] : code;
    }
};

inline int weight_at(const Bytewise& w, int64_t row, int64_t k) { return w.codes[row * w.width + k]; }
inline int weight_at(const Packed& w, int64_t row, int64_t k) { return w.at(row, k); }

// x86's dot product of bytes takes unsigned weights: with OFFSET added to each, it is too large by
// OFFSET times the sum of the token's codes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define OFFSET_WEIGHTS 1
constexpr int32_t OFFSET = 128;
#else
#define OFFSET_WEIGHTS 0
constexpr int32_t OFFSET = 0;
#endif

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)

// Every multiplier's table, of −16 … 15: byte c of table m & 31 is code c times m, plus OFFSET.
struct Tables {
    alignas(64) int8_t rows[32][16];
    constexpr Tables() : rows() {
        for (int m = -16; m < 16; ++m)
            for (int c = 0; c < 16; ++c) rows[m & 31][c] = int8_t(((c ^ 8) - 8) * m + OFFSET);
    }
};
constexpr Tables TABLES;  // a constant: no instruction of a set runs while the library is loaded

inline const int8_t* multiples_of(int multiplier) { return TABLES.rows[multiplier & 31]; }

// A block of codes where it lies, or, with zeros behind the last `inside`, in `padded`.
inline const int8_t* whole_block(const int8_t* from, int64_t inside, int8_t* padded) {
    if (inside >= BLOCK) return from;
    for (int64_t j = 0; j < BLOCK; ++j) padded[j] = j < inside ? from[j] : int8_t(0);
    return padded;
}

// The last block of a row of packed codes, with zeros behind it, into `padded`.
inline void last_block(const Packed& w, int64_t row, int64_t k, int8_t* padded) {
    for (int64_t j = 0; j < BLOCK; ++j)
        padded[j] = k + j < w.width ? int8_t(w.at(row, k + j)) : int8_t(0);
}

#endif

#if defined(__AVX2__)

inline __m128i table_of(int multiplier) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(multiples_of(multiplier)));
}

inline int32_t sum(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

#endif

#if defined(__AVX512VNNI__)

constexpr int64_t AHEAD = 4096;  // bytes, whatever lies there

// The weights of a block of columns, plus 128, as unsigned bytes: `whole` reads 64, `part` fewer.
inline __m512i whole(const Bytewise& w, int64_t row, int64_t k, int64_t) {
    const int8_t* from = w.codes + row * w.width + k;
    // The processor's own prefetching ends at each page: with this, memory is read as fast as it is.
    _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD), _MM_HINT_T1);
    const __m512i bytes = _mm512_loadu_si512(from);
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
}

inline __m512i part(const Bytewise& w, int64_t row, int64_t k, __mmask64 inside) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(inside, w.codes + row * w.width + k);
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
}

inline __m512i whole(const Packed& w, int64_t row, int64_t k, int64_t g) {
    const __m256i pairs =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.codes + row * w.stride + k / 2));
    const __m512i nibbles = _mm512_and_si512(
        _mm512_inserti64x4(_mm512_castsi256_si512(pairs), _mm256_srli_epi16(pairs, 4), 1),
        _mm512_set1_epi8(15));
    if (!w.multiplier) return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table_of(1)), nibbles);
    const int8_t* m = w.multiplier + row * w.groups + (w.group < BLOCK ? k / (BLOCK / 2) : g);
    if (w.group >= BLOCK)
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table_of(*m)), nibbles);
    const __m256i halves[2] = {_mm256_broadcastsi128_si256(table_of(m[0])),
                               _mm256_broadcastsi128_si256(table_of(m[1]))};
    return _mm512_shuffle_epi8(
        _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1), nibbles);
}

inline __m512i part(const Packed& w, int64_t row, int64_t k, __mmask64) {
    alignas(64) uint8_t bytes[64] = {};
    for (int64_t j = 0; j < w.width - k; ++j) bytes[j] = uint8_t(w.at(row, k + j) + 128);
    return _mm512_load_si512(bytes);
}

inline __m512i pairwise(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

inline __m512i pairs_of_pairs(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

inline __m512i quarters(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Lane i: the sum over the lanes of v[i].
inline __m512i sums(const __m512i* v) {
    __m512i four[4];
    for (int i = 0; i < 4; ++i)
        four[i] = pairs_of_pairs(pairwise(v[4 * i], v[4 * i + 1]),
                                 pairwise(v[4 * i + 2], v[4 * i + 3]));
    return quarters(quarters(four[0], four[1]), quarters(four[2], four[3]));
}

// One block of columns of T tokens and R rows onto their sums.
template <int T, int R, class Weight>
inline __attribute__((always_inline)) void multiply(const int8_t* const* a, const int64_t* rows,
                                                    const Weight& w, int64_t k, int64_t g,
                                                    __m512i* total) {
    __m512i tokens[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        tokens[t] = _mm512_loadu_si512(a[t] + k);
        asm("" : "+v"(tokens[t]));  // once into a register, not from memory for every row
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const __m512i weights = whole(w, rows[r], k, g);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
            total[t * R + r] = _mm512_dpbusd_epi32(total[t * R + r], weights, tokens[t]);
    }
}

// Products of T tokens with R rows, OFFSET in the weights, out[t · R + r]. STEPS blocks of columns
// have sums of their own, so that no sum waits for the one before it.
template <int T, class Weight>
inline void products(const int8_t* const* a, const int64_t* rows, const Weight w, int32_t* out) {
    constexpr int R = rows_beside(T), STEPS = 16 / (T * R) < 4 ? 16 / (T * R) : 4;
    __m512i total[STEPS][T * R];
#pragma GCC unroll 16
    for (int i = 0; i < STEPS * T * R; ++i) total[i / (T * R)][i % (T * R)] = _mm512_setzero_si512();
    int64_t k = 0, g = 0, in_group = 0;
    while (k + STEPS * BLOCK <= w.width) {
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; ++step) {
            multiply<T, R>(a, rows, w, k, g, total[step]);
            k += BLOCK;
            in_group += BLOCK;
            if (in_group == w.group) in_group = 0, ++g;
        }
    }
    if constexpr (STEPS > 1)
        for (; k + BLOCK <= w.width; k += BLOCK) {
            multiply<T, R>(a, rows, w, k, g, total[0]);
            in_group += BLOCK;
            if (in_group == w.group) in_group = 0, ++g;
        }
    if (k < w.width) {
        const __mmask64 inside = (1ull << (w.width - k)) - 1;
        for (int r = 0; r < R; ++r) {
            const __m512i weights = part(w, rows[r], k, inside);
            for (int t = 0; t < T; ++t) {
                const __m512i tokens = _mm512_maskz_loadu_epi8(inside, a[t] + k);
                total[0][t * R + r] = _mm512_dpbusd_epi32(total[0][t * R + r], weights, tokens);
            }
        }
    }
    for (int step = 1; step < STEPS; ++step)
        for (int i = 0; i < T * R; ++i) total[0][i] = _mm512_add_epi32(total[0][i], total[step][i]);
    if constexpr (T * R == 16) _mm512_storeu_si512(out, sums(total[0]));
    else for (int i = 0; i < T * R; ++i) out[i] = _mm512_reduce_add_epi32(total[0][i]);
}

#elif defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)

// A dot product of bytes in registers of 32 or 16 of them.

#if defined(__AVXVNNI__)

typedef __m256i Register;

inline Register zeros() { return _mm256_setzero_si256(); }

inline Register bytes_at(const int8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline Register weights_at(const int8_t* from) {
    return _mm256_xor_si256(bytes_at(from), _mm256_set1_epi8(-128));
}

inline Register dot(Register total, Register weights, Register tokens) {
    return _mm256_dpbusd_avx_epi32(total, weights, tokens);
}

// 64 packed codes, those of each half by its table.
inline void nibbles_at(const uint8_t* from, const int8_t* low, const int8_t* high, Register* out) {
    const Register pairs = bytes_at(reinterpret_cast<const int8_t*>(from));
    const Register mask = _mm256_set1_epi8(15);
    const auto looked_up = [](const int8_t* table, Register codes) {
        const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), codes);
    };
    out[0] = looked_up(low, _mm256_and_si256(pairs, mask));
    out[1] = looked_up(high, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask));
}

#else

typedef int8x16_t Register;

inline int32x4_t zeros() { return vdupq_n_s32(0); }

inline Register bytes_at(const int8_t* from) { return vld1q_s8(from); }

inline Register weights_at(const int8_t* from) { return vld1q_s8(from); }

inline int32x4_t dot(int32x4_t total, Register weights, Register tokens) {
    return vdotq_s32(total, weights, tokens);
}

inline void nibbles_at(const uint8_t* from, const int8_t* low, const int8_t* high, Register* out) {
    const int8x16_t tables[2] = {vld1q_s8(low), vld1q_s8(high)};
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t pairs = vld1q_u8(from + 16 * i);
        out[i] = vqtbl1q_s8(tables[0], vandq_u8(pairs, vdupq_n_u8(15)));
        out[i + 2] = vqtbl1q_s8(tables[1], vshrq_n_u8(pairs, 4));
    }
}

inline int32_t sum(int32x4_t v) { return vaddvq_s32(v); }

#endif

typedef decltype(zeros()) Totals;
constexpr int64_t BYTES = sizeof(Register);
constexpr int PARTS = BLOCK / BYTES;

// A block of codes; what lies beyond the width is zero.
inline void tokens_at(const int8_t* from, int64_t inside, Register* out) {
    alignas(64) int8_t padded[BLOCK];
    from = whole_block(from, inside, padded);
    for (int i = 0; i < PARTS; ++i) out[i] = bytes_at(from + i * BYTES);
}

// A block of columns of a row, OFFSET in each; beyond the width, whatever a token's zero meets.
inline void block_at(const Bytewise& w, int64_t row, int64_t k, Register* out) {
    alignas(64) int8_t padded[BLOCK];
    const int8_t* from = whole_block(w.codes + row * w.width + k, w.width - k, padded);
    for (int i = 0; i < PARTS; ++i) out[i] = weights_at(from + i * BYTES);
}

inline void block_at(const Packed& w, int64_t row, int64_t k, Register* out) {
    if (k + BLOCK > w.width) {
        alignas(64) int8_t padded[BLOCK];
        last_block(w, row, k, padded);
        for (int i = 0; i < PARTS; ++i) out[i] = weights_at(padded + i * BYTES);
        return;
    }
    int low = 1, high = 1;
    if (w.multiplier) {
        const int8_t* m = w.multiplier + row * w.groups;
        low = m[k / w.group], high = m[(k + BLOCK / 2) / w.group];
    }
    nibbles_at(w.codes + row * w.stride + k / 2, multiples_of(low), multiples_of(high), out);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Two tokens (rows of a) by two rows of a weight: sums [0][0], [0][1], [1][0], [1][1].
inline int32x4_t two_by_two(int32x4_t total, const Register* a, const Register* b) {
    const auto half = [](Register x, Register y, auto zip) {
        return vreinterpretq_s8_s64(zip(vreinterpretq_s64_s8(x), vreinterpretq_s64_s8(y)));
    };
    const auto low = [](int64x2_t x, int64x2_t y) { return vzip1q_s64(x, y); };
    const auto high = [](int64x2_t x, int64x2_t y) { return vzip2q_s64(x, y); };
    total = vmmlaq_s32(total, half(a[0], a[PARTS], low), half(b[0], b[PARTS], low));
    return vmmlaq_s32(total, half(a[0], a[PARTS], high), half(b[0], b[PARTS], high));
}

#endif

// Products of T tokens with R rows, OFFSET in the weights, out[t · R + r].
template <int T, class Weight>
inline void products(const int8_t* const* a, const int64_t* rows, const Weight& w, int32_t* out) {
    constexpr int R = rows_beside(T), SUMS = T * R <= 2 ? PARTS : 1;
    Register tokens[T][PARTS], weights[R][PARTS];
    const auto read = [&](int64_t k) {
        for (int t = 0; t < T; ++t) tokens_at(a[t] + k, w.width - k, tokens[t]);
        for (int r = 0; r < R; ++r) block_at(w, rows[r], k, weights[r]);
    };
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (T % 2 == 0 && R % 2 == 0) {
        int32x4_t total[T / 2][R / 2];
        for (int i = 0; i < T * R / 4; ++i) total[i / (R / 2)][i % (R / 2)] = zeros();
        for (int64_t k = 0; k < w.width; k += BLOCK) {
            read(k);
            for (int i = 0; i < PARTS; ++i)
                for (int t = 0; t < T; t += 2)
                    for (int r = 0; r < R; r += 2)
                        total[t / 2][r / 2] =
                            two_by_two(total[t / 2][r / 2], &tokens[t][i], &weights[r][i]);
        }
        for (int t = 0; t < T; t += 2)
            for (int r = 0; r < R; r += 2) {
                int32_t four[4];
                vst1q_s32(four, total[t / 2][r / 2]);
                for (int i = 0; i < 4; ++i) out[(t + i / 2) * R + r + i % 2] = four[i];
            }
        return;
    }
#endif
    Totals total[T * R][SUMS];
    for (int i = 0; i < T * R * SUMS; ++i) total[i / SUMS][i % SUMS] = zeros();
    for (int64_t k = 0; k < w.width; k += BLOCK) {
        read(k);
        for (int i = 0; i < PARTS; ++i)
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r) {
                    Totals& one = total[t * R + r][i % SUMS];
                    one = dot(one, weights[r][i], tokens[t][i]);
                }
    }
    for (int i = 0; i < T * R; ++i) {
        out[i] = 0;
        for (int j = 0; j < SUMS; ++j) out[i] += sum(total[i][j]);
    }
}

#elif defined(__AVX2__)

// A product of bytes without an instruction for them: pairs of 16-bit numbers, exact in 32 bits.
// The tokens, and for many of them the weights, are widened once, with zeros up to a whole block.

// Rows of 16-bit codes, as many a row as fill whole blocks.
struct Wide {
    const int16_t* codes;
    int64_t width;

    int64_t blocks() const { return (width + BLOCK - 1) / BLOCK; }
};

constexpr int PARTS = BLOCK / 16;  // registers of a block in 16 bits

inline __m256i widened(__m128i bytes) { return _mm256_cvtepi8_epi16(bytes); }

// A block of columns of a row in 16 bits; what lies beyond the width is zero.
inline void block_at(const Bytewise& w, int64_t row, int64_t k, __m256i* out) {
    alignas(64) int8_t padded[BLOCK];
    const int8_t* from = whole_block(w.codes + row * w.width + k, w.width - k, padded);
    for (int i = 0; i < PARTS; ++i)
        out[i] = widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
}

inline void block_at(const Packed& w, int64_t row, int64_t k, __m256i* out) {
    if (k + BLOCK > w.width) {
        alignas(64) int8_t padded[BLOCK];
        last_block(w, row, k, padded);
        for (int i = 0; i < PARTS; ++i)
            out[i] = widened(_mm_load_si128(reinterpret_cast<const __m128i*>(padded) + i));
        return;
    }
    const __m128i* pairs = reinterpret_cast<const __m128i*>(w.codes + row * w.stride + k / 2);
    const __m128i mask = _mm_set1_epi8(15);
    __m128i low = table_of(1), high = low;
    if (w.multiplier) {
        const int8_t* m = w.multiplier + row * w.groups;
        low = table_of(m[k / w.group]), high = table_of(m[(k + BLOCK / 2) / w.group]);
    }
    for (int i = 0; i < 2; ++i) {
        const __m128i both = _mm_loadu_si128(pairs + i);
        out[i] = widened(_mm_shuffle_epi8(low, _mm_and_si128(both, mask)));
        out[i + 2] = widened(_mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi16(both, 4), mask)));
    }
}

inline void block_at(const Wide& w, int64_t row, int64_t k, __m256i* out) {
    const int16_t* from = w.codes + row * w.blocks() * BLOCK + k;
    for (int i = 0; i < PARTS; ++i)
        out[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + i);
}

// `count` rows from `row` on of a weight, in 16 bits.
template <class Weight>
void widen(const Weight& w, int64_t row, int64_t count, int16_t* out) {
    for (int64_t r = row; r < row + count; ++r)
        for (int64_t k = 0; k < w.width; k += BLOCK, out += BLOCK) {
            __m256i block[PARTS];
            block_at(w, r, k, block);
            for (int i = 0; i < PARTS; ++i)
                _mm256_store_si256(reinterpret_cast<__m256i*>(out) + i, block[i]);
        }
}

// Products of T tokens with R rows from `row` on, out[t · R + r].
template <int T, int R, class Weight>
inline __attribute__((always_inline)) void products(const Wide& tokens, int64_t token,
                                                    const Weight& w, int64_t row, int32_t* out) {
    constexpr int SUMS = T * R < PARTS ? PARTS : 1;  // of one product: none waits for the one before
    __m256i total[T][R][SUMS];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < SUMS; ++i) total[t][r][i] = _mm256_setzero_si256();
    const int64_t stride = tokens.blocks() * BLOCK;
    const int16_t* a = tokens.codes + token * stride;
    for (int64_t k = 0; k < w.width; k += BLOCK) {
        __m256i weights[R][PARTS];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) block_at(w, row + r, k, weights[r]);
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const __m256i x =
                    _mm256_load_si256(reinterpret_cast<const __m256i*>(a + t * stride + k) + i);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    total[t][r][i % SUMS] =
                        _mm256_add_epi32(total[t][r][i % SUMS], _mm256_madd_epi16(x, weights[r][i]));
            }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            for (int i = 1; i < SUMS; ++i)
                total[t][r][0] = _mm256_add_epi32(total[t][r][0], total[t][r][i]);
            out[t * R + r] = sum(total[t][r][0]);
        }
}

#else

template <int T, class Weight>
inline void products(const int8_t* const* a, const int64_t* rows, const Weight& w, int32_t* out) {
    constexpr int R = rows_beside(T);
    int8_t weights[BLOCK];
    for (int i = 0; i < T * R; ++i) out[i] = 0;
    for (int64_t k = 0; k < w.width; k += BLOCK) {
        const int64_t n = lower_of(BLOCK, w.width - k);
        for (int r = 0; r < R; ++r) {
            for (int64_t j = 0; j < n; ++j) weights[j] = int8_t(weight_at(w, rows[r], k + j));
            for (int t = 0; t < T; ++t) {
                int32_t total = 0;
                for (int64_t j = 0; j < n; ++j) total += int32_t(a[t][k + j]) * weights[j];
                out[t * R + r] += total;
            }
        }
    }
}

#endif

inline void put_scaled(const Scaling& s, int64_t m, int64_t n, int32_t total) {
    const float value = float(total) * s.token[m * s.stride] * s.row[n];
    store(s.out, s.type, m * s.rows + n, s.bias ? value + s.bias[n] : value);
}

// `count` neighbouring outputs of one token.
inline void put_scaled(const Scaling& s, int64_t m, int64_t n, const int32_t* totals,
                       int64_t count) {
    if (s.type == Type::FLOAT32 && !s.bias) {
        float* to = static_cast<float*>(s.out) + m * s.rows + n;
        const float step = s.token[m * s.stride];
        for (int64_t r = 0; r < count; ++r) to[r] = float(totals[r]) * step * s.row[n + r];
    } else {
        for (int64_t r = 0; r < count; ++r) put_scaled(s, m, n + r, totals[r]);
    }
}

// Tokens that stay in the second cache while the weights pass by.
constexpr int64_t TOKENS_AT_ONCE = 128;

#if defined(__AVX2__) && !OFFSET_WEIGHTS

// Rows of a weight from `begin` on, by tokens from `first` on, both widened where that pays.
template <int T, int R, class Weight>
void tile(const Product& p, const Wide& tokens, int64_t first, int64_t token, const Weight& w,
          int64_t from, int64_t row) {
    int32_t out[T * R];
    products<T, R>(tokens, token, w, from, out);
    for (int t = 0; t < T; ++t) put_scaled(p.scaling, first + token + t, row, out + t * R, R);
}

// All tokens by R rows of a weight.
template <int R, class Weight>
void band(const Product& p, const Wide& tokens, int64_t first, int64_t count, const Weight& w,
          int64_t from, int64_t row) {
    int64_t token = 0;
    for (; token + 4 <= count; token += 4) tile<4, R>(p, tokens, first, token, w, from, row);
    if (token + 2 <= count) tile<2, R>(p, tokens, first, token, w, from, row), token += 2;
    if (token < count) tile<1, R>(p, tokens, first, token, w, from, row);
}

constexpr int64_t FEW_TOKENS = 4;  // for which weights are widened as they are read
// Rows that tokens meet at once: what the registers hold, beside sums of several steps for few.
constexpr int64_t ROWS_OF_FEW = 2, ROWS_OF_MANY = 3;

template <class Weight>
void product_by(const Product& p, const Weight& w, int64_t begin, int64_t end) {
    const int64_t padded = (p.width + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t most = lower_of(p.tokens, TOKENS_AT_ONCE);
    const Buffer<int16_t> tokens(most * padded), rows(ROWS_OF_MANY * padded);
    for (int64_t first = 0; first < p.tokens; first += TOKENS_AT_ONCE) {
        const int64_t count = lower_of(TOKENS_AT_ONCE, p.tokens - first);
        widen(Bytewise{p.codes, p.width, p.width}, first, count, tokens.data());
        const Wide codes{tokens.data(), p.width};
        int64_t row = begin;
        if (count <= FEW_TOKENS) {
            for (; row + ROWS_OF_FEW <= end; row += ROWS_OF_FEW)
                band<ROWS_OF_FEW>(p, codes, first, count, w, row, row);
        } else {
            for (; row + ROWS_OF_MANY <= end; row += ROWS_OF_MANY) {
                widen(w, row, ROWS_OF_MANY, rows.data());
                band<ROWS_OF_MANY>(p, codes, first, count, Wide{rows.data(), p.width}, 0, row);
            }
        }
        for (; row < end; ++row) band<1>(p, codes, first, count, w, row, row);
    }
}

#else

// The sum of n codes, times OFFSET, which products with offset weights have too much.
inline uint32_t excess(const int8_t* codes, int64_t n) {
    int32_t total = 0;
    for (int64_t k = 0; k < n; ++k) total += codes[k];
    return uint32_t(total) * OFFSET;
}

template <int T, class Weight>
void products_of(const Product& p, const Weight& w, int64_t begin, int64_t end) {
    constexpr int R = rows_beside(T);
    const Buffer<uint32_t> excesses(OFFSET ? p.tokens : 0);
    if (OFFSET)
        for (int64_t m = 0; m < p.tokens; ++m) excesses[m] = excess(p.codes + m * p.width, p.width);
    const int64_t rows = p.scaling.rows;
    for (int64_t chunk = 0; chunk < p.tokens; chunk += TOKENS_AT_ONCE) {
        const int64_t last = lower_of(chunk + TOKENS_AT_ONCE, p.tokens);
        for (int64_t row = begin; row < end; row += R) {
            const int64_t inside = lower_of<int64_t>(R, end - row);
            int64_t which[R];
            for (int r = 0; r < R; ++r) which[r] = lower_of(row + r, rows - 1);
            for (int64_t first = chunk; first < last; first += T) {
                const int8_t* inputs[T];
                int32_t out[T * R];
                for (int t = 0; t < T; ++t)
                    inputs[t] = p.codes + lower_of(first + t, p.tokens - 1) * p.width;
                products<T>(inputs, which, w, out);
                for (int64_t t = 0; t < lower_of<int64_t>(T, last - first); ++t) {
                    int32_t* totals = out + t * R;
                    if (OFFSET)  // sums wrap, as unsigned numbers may
                        for (int r = 0; r < R; ++r)
                            totals[r] = int32_t(uint32_t(totals[r]) - excesses[first + t]);
                    put_scaled(p.scaling, first + t, row, totals, inside == R ? R : inside);
                }
            }
        }
    }
}

template <class Weight>
void product_by(const Product& p, const Weight& w, int64_t begin, int64_t end) {
    if (p.tokens == 1) products_of<1>(p, w, begin, end);
    else if (p.tokens == 2) products_of<2>(p, w, begin, end);
    else products_of<4>(p, w, begin, end);
}

#endif

// ---- products with float activations ------------------------------------------------------------

// 64 codes as floats, 16 a register.
#if defined(__AVX512BW__)

inline void codes_as_floats(const Bytewise& w, int64_t row, int64_t k, Floats* out) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(w.codes + row * w.width + k);
    for (int i = 0; i < 4; ++i)
        out[i] = Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + i))));
}

inline void nibbles_as_floats(const Packed& w, int64_t row, int64_t k, __m512 table, Floats* out) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(w.codes + row * w.stride + k / 2);
    const __m128i mask = _mm_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
        const __m128i pairs = _mm_loadu_si128(bytes + i);
        const __m128i low = _mm_and_si128(pairs, mask);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
        out[i] = Floats(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(low), table));
        out[i + 2] = Floats(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(high), table));
    }
}

inline void codes_as_floats(const Packed& w, int64_t row, int64_t k, Floats* out) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    nibbles_as_floats(w, row, k, codes, out);
}

#elif defined(__AVX2__)

inline Floats floats_of(__m128i bytes) {
    const __m256 halves[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                              _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    Floats value;
    __builtin_memcpy(&value, halves, sizeof value);
    return value;
}

inline void codes_as_floats(const Bytewise& w, int64_t row, int64_t k, Floats* out) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(w.codes + row * w.width + k);
    for (int i = 0; i < 4; ++i) out[i] = floats_of(_mm_loadu_si128(bytes + i));
}

inline void nibbles_as_floats(const Packed& w, int64_t row, int64_t k, __m128i codes,
                              Floats* out) {
    const __m128i* pairs = reinterpret_cast<const __m128i*>(w.codes + row * w.stride + k / 2);
    const __m128i mask = _mm_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
        const __m128i both = _mm_loadu_si128(pairs + i);
        out[i] = floats_of(_mm_shuffle_epi8(codes, _mm_and_si128(both, mask)));
        out[i + 2] = floats_of(_mm_shuffle_epi8(codes, _mm_and_si128(_mm_srli_epi16(both, 4), mask)));
    }
}

inline void codes_as_floats(const Packed& w, int64_t row, int64_t k, Floats* out) {
    const __m128i codes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    nibbles_as_floats(w, row, k, codes, out);
}

#else

inline void codes_as_floats(const Bytewise& w, int64_t row, int64_t k, Floats* out) {
    const int8_t* bytes = w.codes + row * w.width + k;
    for (int64_t j = 0; j < BLOCK; ++j) out[j / LANES][j % LANES] = bytes[j];
}

inline void codes_as_floats(const Packed& w, int64_t row, int64_t k, Floats* out) {
    const uint8_t* bytes = w.codes + row * w.stride + k / 2;
    for (int64_t j = 0; j < BLOCK / 2; ++j) {
        out[j / LANES][j % LANES] = float(int8_t(bytes[j] << 4) >> 4);
        out[2 + j / LANES][j % LANES] = float(int8_t(bytes[j]) >> 4);
    }
}

#endif

}  // namespace
}  // namespace smoothq

#include "weights.h"

namespace smoothq {
namespace {

// What the codes of a row's group are multiplied by.
inline float step_at(const ScaledWeight& w, int64_t row, int64_t group) {
    const int64_t index = row * w.groups + group;
    if (w.multiplier) return load(w.scale, w.scale_type, row) * w.multiplier[index];
    return load(w.scale, w.scale_type, index) * w.tensor_scale;
}

// Whether a row's groups are whole blocks, halves or quarters of one.
inline bool in_blocks(const ScaledWeight& w) {
    const int64_t size = w.width / w.groups;
    return size % BLOCK == 0 || (w.width % BLOCK == 0 && (size == BLOCK / 2 || size == BLOCK / 4));
}

// The steps of a row's blocks, one block after the other: those of both halves, or of 16 columns
// each where groups are so small.
struct Steps {
    Steps(const ScaledWeight& weight, int64_t r)
        : w(weight), row(r), size(w.width / w.groups), fine(size < BLOCK / 2) {
        read();
    }

    void next() {
        at += BLOCK;
        if (at >= w.width) return;
        if (size > BLOCK && at % size) return;
        group += size < BLOCK ? BLOCK / size : 1;
        read();
    }

    // Four steps into the codes of a block, where it has so many; what is left is 1.
    void multiply(Floats* codes) const {
        if (fine)
            for (int i = 0; i < 4; ++i) codes[i] *= quarters[i];
    }

    const ScaledWeight& w;
    const int64_t row, size;
    const bool fine;
    float low = 1, high = 1, quarters[4];
    int64_t at = 0, group = 0;

private:
    void read() {
        if (fine) {
            for (int i = 0; i < 4; ++i) quarters[i] = step_at(w, row, group + i);
            return;
        }
        low = step_at(w, row, group);
        high = size < BLOCK ? step_at(w, row, group + 1) : low;
    }
};

template <int T, class Weight>
void float_products_of(const FloatProduct& p, const Weight& w, int64_t begin, int64_t end) {
    const int64_t width = p.weight.width;
    for (int64_t row = begin; row < end; ++row)
        for (int64_t first = 0; first < p.tokens; first += T) {
            const float* inputs[T];
            for (int t = 0; t < T; ++t)
                inputs[t] = p.x + lower_of(first + t, p.tokens - 1) * width;
            Floats total[T] = {};
            Steps steps(p.weight, row);
            for (int64_t k = 0; k < width; k += BLOCK, steps.next()) {
                Floats codes[4];
                codes_as_floats(w, row, k, codes);
                steps.multiply(codes);
                for (int t = 0; t < T; ++t) {
                    const float* v = inputs[t] + k;
                    const Floats first_half =
                        fused(codes[1], floats_at(v + LANES), codes[0] * floats_at(v));
                    const Floats second_half = fused(codes[3], floats_at(v + 3 * LANES),
                                                     codes[2] * floats_at(v + 2 * LANES));
                    total[t] = fused(second_half, all(steps.high),
                                     fused(first_half, all(steps.low), total[t]));
                }
            }
            for (int64_t t = 0; t < lower_of<int64_t>(T, p.tokens - first); ++t)
                p.out[(first + t) * p.rows + row] = sum(total[t]) + (p.bias ? p.bias[row] : 0.0f);
        }
}

// oneDNN's int8 product, which PyTorch has, is fast where the processor multiplies bytes, and a
// plain loop elsewhere.
#if defined(__AVX512VNNI__)
constexpr int64_t MOST_TOKENS = 64;
#else
constexpr int64_t MOST_TOKENS = INT64_MAX;
#endif

// ---- what the table has -------------------------------------------------------------------------

void quantize(const Quantize& q, int64_t begin, int64_t end) {
    const Factors factors(q.rotation);
    const int64_t width = q.width;
    const Buffer<float> first(width), second(width);
    for (int64_t m = begin; m < end; ++m) {
        const float* v = row_of(q.x, q.type, m, width, first.data());
        if (factors.signs) {
            float* rotated = v == first.data() ? second.data() : first.data();
            float* scratch = v == first.data() ? first.data() : second.data();
            rotate_token(factors, v, rotated, scratch, width);
            v = rotated;
        }
        q.scales[m] = quantize_token(q.quantizer, v, width, q.codes + m * width, first.data());
    }
}

void fp_quantize(const FpQuantize& q, int64_t begin, int64_t end) {
    const Buffer<float> scratch(q.width);
    const Format format = q.element == Element::E4M3 ? E4M3_FORMAT : E2M1_FORMAT;
    for (int64_t m = begin; m < end; ++m) {
        const float* v = row_of(q.x, q.type, m, q.width, scratch.data());
        fp_quantize_token(q, v, format, q.out + m * q.width);
    }
}

void rotate(const Rotate& r, int64_t begin, int64_t end) {
    const Factors factors(r.rotation);
    const int64_t width = r.width;
    const Buffer<float> first(width), second(width), third(width);
    for (int64_t m = begin; m < end; ++m) {
        const float* v = row_of(r.x, r.type, m, width, first.data());
        rotate_token(factors, v, second.data(), third.data(), width);
        for (int64_t k = 0; k < width; ++k) store(r.out, r.type, m * width + k, second[k]);
    }
}

void product(const Product& p, int64_t begin, int64_t end) {
    if (p.bytes) product_by(p, Bytewise{p.bytes, p.width, p.width}, begin, end);
    else product_by(p, packed_of(p.packed, p.multiplier, p.groups, p.width), begin, end);
}

void scale(const Scale& s, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
        const char* from = reinterpret_cast<const char*>(s.totals + m * s.scaling.rows);
#pragma GCC ivdep
        for (int64_t n = 0; n < s.scaling.rows; ++n) {
            int32_t total;
            __builtin_memcpy(&total, from + 4 * n, 4);
            put_scaled(s.scaling, m, n, total);
        }
    }
}

void unpack(const Unpack& u, int64_t begin, int64_t end) {
    const Packed w = packed_of(u.packed, u.multiplier, u.groups, u.width);
    const int64_t half = BLOCK / 2, whole = w.group % half ? 0 : u.width / BLOCK * BLOCK;
    for (int64_t row = begin; row < end; ++row) {
        int8_t* to = u.out + row * u.width;
        const int8_t* multipliers = u.multiplier ? u.multiplier + row * u.groups : nullptr;
        for (int64_t k = 0; k < whole; k += BLOCK) {
            const uint8_t* bytes = w.codes + row * w.stride + k / 2;
            const int low = multipliers ? multipliers[k / w.group] : 1;
            const int high = multipliers ? multipliers[(k + half) / w.group] : 1;
            for (int64_t j = 0; j < half; ++j) {
                to[k + j] = int8_t((int8_t(bytes[j] << 4) >> 4) * low);
                to[k + j + half] = int8_t((int8_t(bytes[j]) >> 4) * high);
            }
        }
        for (int64_t k = whole; k < u.width; ++k) to[k] = int8_t(w.at(row, k));
    }
}

void float_product(const FloatProduct& p, int64_t begin, int64_t end) {
    with_codes(p.weight, [&](const auto& codes) {
        if (p.tokens == 1) float_products_of<1>(p, codes, begin, end);
        else float_products_of<4>(p, codes, begin, end);
    });
}

void dequantize(const Dequantize& d, int64_t begin, int64_t end) {
    const ScaledWeight& w = d.weight;
    const int64_t width = w.width, size = width / w.groups;
    with_codes(w, [&](const auto& codes) {
        for (int64_t row = begin; row < end; ++row) {
            float* to = d.out + (row - d.first) * width;
            if (!in_blocks(w)) {
                for (int64_t k = 0; k < width; ++k)
                    to[k] = weight_at(codes, row, k) * step_at(w, row, k / size);
                continue;
            }
            Steps steps(w, row);
            for (int64_t k = 0; k < width; k += BLOCK, steps.next()) {
                Floats block[4];
                codes_as_floats(codes, row, k, block);
                steps.multiply(block);
                for (int i = 0; i < 4; ++i)
                    put(to + k + i * LANES, block[i] * (i < 2 ? steps.low : steps.high));
            }
        }
    });
}

void expand(const Expand& e, int64_t begin, int64_t end) {
    const int64_t groups = e.width / e.group, group_bytes = e.group * e.bits / 8;
    const auto half = [](const uint8_t* from, int64_t at) {
        uint16_t bits;
        __builtin_memcpy(&bits, from + 2 * at, 2);
        return from_float16(bits);
    };
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* codes = e.rows + row * e.row_bytes;
        const uint8_t* floats = codes + groups * group_bytes;
        float* to = e.out + row * e.width;
        for (int64_t g = 0; g < groups; ++g, codes += group_bytes, to += e.group) {
            const float scale = half(floats, g), offset = half(floats, groups + g);
            if (e.bits == 8) {
                for (int64_t j = 0; j < e.group; ++j) to[j] = int8_t(codes[j]) * scale + offset;
                continue;
            }
            for (int64_t j = 0; j < group_bytes; ++j) {
                to[j] = (int8_t(codes[j] << 4) >> 4) * scale + offset;
                to[group_bytes + j] = (int8_t(codes[j]) >> 4) * scale + offset;
            }
        }
    }
}

}  // namespace
}  // namespace smoothq

#include "tiles.h"

namespace smoothq {
namespace {

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)
const Table TABLE{TEXT(ISA), MOST_TOKENS,   quantize,   fp_quantize, rotate, product, scale,
                  unpack,    float_product, dequantize, expand,      SPLIT,  PARTS_PRODUCT};

}  // namespace
}  // namespace smoothq
