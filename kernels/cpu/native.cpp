// The passes that PyTorch would need several operators for, one each: rotate, smooth and quantize a
// token; a product of few tokens with int8 or packed 4-bit weights; the scaling of an integer
// product. Plain C interface, row-major matrices, M tokens, N out_features, K in_features.
//
// Every code is the one that `reference.py` defines: float32 in the same order, IEEE division,
// rounding half to even. `int8_t` sums wrap in 32 bits, so that any order gives the same total.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;          // columns that are packed, and multiplied, together
constexpr int64_t SERIAL_WORK = 1 << 14;  // numbers below which a second thread does not pay

enum Type { FLOAT32, BFLOAT16 };
enum Mode { TOKEN, FULL_RANGE, SMOOTHED, STATIC, GROUPS };

// ---- numbers ------------------------------------------------------------------------------------

inline float from_bfloat16(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(void* out, Type type, int64_t at, float value) {
    if (type == FLOAT32) static_cast<float*>(out)[at] = value;
    else static_cast<uint16_t*>(out)[at] = to_bfloat16(value);
}

inline float load(const void* in, Type type, int64_t at) {
    if (type == FLOAT32) return static_cast<const float*>(in)[at];
    return from_bfloat16(static_cast<const uint16_t*>(in)[at]);
}

// A row in float32: itself, or converted into `scratch`.
const float* row_of(const void* x, Type type, int64_t row, int64_t width, float* scratch) {
    if (type == FLOAT32) return static_cast<const float*>(x) + row * width;
    const uint16_t* halves = static_cast<const uint16_t*>(x) + row * width;
    for (int64_t k = 0; k < width; ++k) scratch[k] = from_bfloat16(halves[k]);
    return scratch;
}

inline Floats floats_at(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void put(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline float sum(Floats value) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += value[i];
    return total;
}

// ---- rotation -----------------------------------------------------------------------------------

// x · diag(signs) · (I ⊗ left ⊗ Sylvester's matrix of order `right`) / √(orders)
struct Rotation {
    const int8_t* signs;
    std::vector<float> left;  // (order, order)
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
inline void left_tile(const Rotation& r, const float* block, float* out, int64_t m, int64_t c,
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

void rotate(const Rotation& r, const float* x, float* out, float* scratch, int64_t width) {
    const int64_t size = r.order * r.right;
    const float factor = float(1.0 / std::sqrt(double(size)));
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
            std::fill(out + at, out + at + size, 0.0f);
            for (int64_t m = 0; m < r.order; ++m)
                for (int64_t k = 0; k < r.order; ++k)
                    for (int64_t c = 0; c < r.right; ++c)
                        out[at + m * r.right + c] +=
                            factor * r.left[k * r.order + m] * block[k * r.right + c];
        }
    }
}

Rotation rotation_of(const int8_t* signs, const int8_t* left, int64_t order, int64_t right) {
    Rotation r{signs, std::vector<float>(order * order), order, right};
    for (int64_t i = 0; i < order * order; ++i) r.left[i] = left[i];
    return r;
}

// ---- quantizers ---------------------------------------------------------------------------------

struct Quantizer {
    Mode mode;
    int bits;
    int64_t group;             // GROUPS: channels of one multiplier
    int largest;               // GROUPS: the largest multiplier
    float clip;
    const int8_t* multiplier;  // SMOOTHED: (K,)
    float scale;               // STATIC
};

// max |v|, by the bits: a NaN is the largest of all, and so is not lost.
inline float largest(const float* v, int64_t n) {
    uint32_t most = 0;
    for (int64_t k = 0; k < n; ++k) {
        uint32_t bits;
        std::memcpy(&bits, v + k, 4);
        most = std::max(most, bits & 0x7fffffffu);
    }
    float value;
    std::memcpy(&value, &most, 4);
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
    for (int64_t k = 0; k < n; ++k) lowest = std::min(lowest, v[k]);
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
            std::memcpy(&bits, &x, sizeof bits);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
            lowest = x < lowest ? x : lowest;
        }
        most = wider<1>(wider<2>(wider<4>(wider<8>(most))));
        lowest = lower<1>(lower<2>(lower<4>(lower<8>(lowest))));
        float magnitude;
        const uint32_t bits = most[0];
        std::memcpy(&magnitude, &bits, 4);
        out[g] = lowest[0] == -magnitude ? lowest[0] : magnitude;
    }
}

inline float nonzero(float scale) { return scale == 0 ? 1.0f : scale; }

inline int8_t code_of(float v, float scale, float low, float high, int factor) {
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 · 2^23: a sum with it has no fraction
    const float clamped = std::min(std::max(v / scale, low), high);
    return int8_t(int(clamped + TO_INTEGER - TO_INTEGER) * factor);
}

// round(v / scale), clamped, times `factor`.
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
        case STATIC:
            codes_of(v, width, q.scale, highest, 1, codes);
            return q.scale;
        case TOKEN: {
            const float scale = nonzero(largest(v, width) * q.clip / highest);
            codes_of(v, width, scale, highest, 1, codes);
            return scale;
        }
        case FULL_RANGE: {
            const float scale = nonzero(extreme(v, width) * q.clip / -(highest + 1));
            codes_of(v, width, scale, highest, 1, codes);
            return scale;
        }
        case SMOOTHED: {
            for (int64_t k = 0; k < width; ++k) scratch[k] = v[k] / q.multiplier[k];
            const float scale = nonzero(largest(scratch, width) * q.clip / highest);
            codes_of(scratch, width, scale, highest, 1, codes);
            for (int64_t k = 0; k < width; ++k) codes[k] = int8_t(codes[k] * q.multiplier[k]);
            return scale;
        }
        default: {
            const int64_t groups = width / q.group;
            static thread_local std::vector<float> extremes;
            static thread_local std::vector<int> factors;
            extremes.resize(groups);
            factors.resize(groups);
            extremes_of(v, groups, q.group, extremes.data());
            const float base = largest(extremes.data(), groups) * q.clip / q.largest;
            const float scale = nonzero(base / (highest + 1));
            const float step = scale * (highest + 1);
            for (int64_t g = 0; g < groups; ++g) {
                const float steps = std::ceil(std::fabs(extremes[g]) * q.clip / step);
                const int m = int(std::min(std::max(steps, 1.0f), float(q.largest)));
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
        const int64_t first = k / BLOCK * BLOCK, columns = std::min(BLOCK, width - first);
        const int64_t half = (columns + 1) / 2, j = k - first;
        const uint8_t byte = codes[row * stride + first / 2 + j % half];
        const int code = ((j < half ? byte & 15 : byte >> 4) ^ 8) - 8;
        return multiplier ? code * multiplier[row * groups + k / group] : code;
    }
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Every multiplier's table, of −16 … 15: byte c of table m & 31 is code c times m, plus 128.
struct Tables {
    alignas(64) uint8_t rows[32][16];
    Tables() {
        for (int m = -16; m < 16; ++m)
            for (int c = 0; c < 16; ++c) rows[m & 31][c] = uint8_t(((c ^ 8) - 8) * m + 128);
    }
};
const Tables TABLES;

inline __m128i table_of(int multiplier) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(TABLES.rows[multiplier & 31]));
}

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

// Products of T tokens with R rows, out[t · R + r]. A dot product of signed bytes does not exist
// here; with 128 added to each weight there is one, too large by 128 · Σ a. STEPS blocks of columns
// have sums of their own, so that no sum waits for the one before it.
template <int T, class Weight>
inline void products(const int8_t* const* a, const int64_t* rows, const Weight w,
                     const int32_t* a_sums, int32_t* out) {
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
    for (int i = 0; i < T * R; ++i) out[i] -= a_sums[i / R] << 7;
}

#else

inline int weight_at(const Bytewise& w, int64_t row, int64_t k) { return w.codes[row * w.width + k]; }
inline int weight_at(const Packed& w, int64_t row, int64_t k) { return w.at(row, k); }

template <int T, class Weight>
inline void products(const int8_t* const* a, const int64_t* rows, const Weight& w, const int32_t*,
                     int32_t* out) {
    constexpr int R = rows_beside(T);
    int8_t weights[BLOCK];
    std::fill(out, out + T * R, 0);
    for (int64_t k = 0; k < w.width; k += BLOCK) {
        const int64_t n = std::min(BLOCK, w.width - k);
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

// A product as it is rounded: a compiler must not fuse it with the sum that follows, as then the
// result would depend on which of two equal ways was faster when they were timed.
inline float rounded(float product) {
#if defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#else
    volatile float kept = product;
    product = kept;
#endif
    return product;
}

struct Scaling {
    const float* token;   // (M,), or one for all where stride is 0
    int64_t stride;
    const float* weight;  // (N,)
    const float* bias;    // (N,) or null
    void* out;            // (M, N)
    Type type;
    int64_t rows;

    void operator()(int64_t m, int64_t n, int32_t total) const {
        const float value = rounded(float(total) * token[m * stride] * weight[n]);
        store(out, type, m * rows + n, bias ? value + bias[n] : value);
    }

    // `count` neighbouring outputs of one token.
    void operator()(int64_t m, int64_t n, const int32_t* totals, int64_t count) const {
        if (type == FLOAT32 && !bias) {
            float* to = static_cast<float*>(out) + m * rows + n;
            const float step = token[m * stride];
            for (int64_t r = 0; r < count; ++r) to[r] = float(totals[r]) * step * weight[n + r];
        } else {
            for (int64_t r = 0; r < count; ++r) (*this)(m, n + r, totals[r]);
        }
    }
};

// Tokens that stay in the second cache while the weights pass by.
constexpr int64_t TOKENS_AT_ONCE = 128;

template <int T, class Weight>
void few_tokens(const int8_t* a, const Weight& w, const Scaling& scaling, int64_t tokens) {
    constexpr int R = rows_beside(T);
    const int64_t width = w.width, rows = scaling.rows, blocks = (rows + R - 1) / R;
    std::vector<int32_t> a_sums(tokens);
#pragma omp parallel if (rows * width > SERIAL_WORK)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < tokens; ++m) {
            int32_t total = 0;
            for (int64_t k = 0; k < width; ++k) total += a[m * width + k];
            a_sums[m] = total;
        }
        for (int64_t chunk = 0; chunk < tokens; chunk += TOKENS_AT_ONCE) {
            const int64_t last = std::min(chunk + TOKENS_AT_ONCE, tokens);
#pragma omp for schedule(static) nowait
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t row = block * R, inside = std::min<int64_t>(R, rows - row);
                int64_t which[R];
                for (int r = 0; r < R; ++r) which[r] = std::min(row + r, rows - 1);
                for (int64_t first = chunk; first < last; first += T) {
                    const int8_t* inputs[T];
                    int32_t input_sums[T], out[T * R];
                    for (int t = 0; t < T; ++t) {
                        const int64_t m = std::min(first + t, tokens - 1);
                        inputs[t] = a + m * width;
                        input_sums[t] = a_sums[m];
                    }
                    products<T>(inputs, which, w, input_sums, out);
                    for (int64_t t = 0; t < std::min<int64_t>(T, last - first); ++t)
                        scaling(first + t, row, out + t * R, inside == R ? R : inside);
                }
            }
        }
    }
}

template <class Weight>
void product(const int8_t* a, const Weight& w, const Scaling& scaling, int64_t tokens) {
    if (tokens == 1) few_tokens<1>(a, w, scaling, tokens);
    else if (tokens == 2) few_tokens<2>(a, w, scaling, tokens);
    else few_tokens<4>(a, w, scaling, tokens);
}

// ---- products with float activations ------------------------------------------------------------

// 64 codes as floats, 16 a register.
#if defined(__AVX512BW__)

inline void codes_as_floats(const Bytewise& w, int64_t row, int64_t k, Floats* out) {
    const __m128i* bytes = reinterpret_cast<const __m128i*>(w.codes + row * w.width + k);
    for (int i = 0; i < 4; ++i)
        out[i] = Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + i))));
}

inline void codes_as_floats(const Packed& w, int64_t row, int64_t k, Floats* out) {
    const __m512 table =
        _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
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

struct Steps {
    const void* scale;  // (N, groups), or (N, 1) beside multipliers
    Type type;
    const int8_t* multiplier;  // (N, groups) or null
    int64_t group, groups;

    float at(int64_t row, int64_t k) const {
        const int64_t index = row * groups + k / group;
        if (multiplier) return load(scale, type, row) * multiplier[index];
        return load(scale, type, index);
    }
};

template <int T, class Weight>
void weight_only(const float* x, const Weight& w, const Steps& steps, const float* bias, float* out,
                 int64_t tokens, int64_t rows) {
    const int64_t width = w.width;
#pragma omp parallel for schedule(static) if (rows * width > SERIAL_WORK)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t first = 0; first < tokens; first += T) {
            const float* inputs[T];
            for (int t = 0; t < T; ++t) inputs[t] = x + std::min(first + t, tokens - 1) * width;
            Floats total[T] = {};
            for (int64_t k = 0; k < width; k += BLOCK) {
                Floats codes[4];
                codes_as_floats(w, row, k, codes);
                const float low = steps.at(row, k), high = steps.at(row, k + BLOCK / 2);
                for (int t = 0; t < T; ++t) {
                    const float* v = inputs[t] + k;
                    const Floats first_half =
                        codes[0] * floats_at(v) + codes[1] * floats_at(v + LANES);
                    const Floats second_half = codes[2] * floats_at(v + 2 * LANES) +
                                               codes[3] * floats_at(v + 3 * LANES);
                    total[t] += first_half * low + second_half * high;
                }
            }
            for (int64_t t = 0; t < std::min<int64_t>(T, tokens - first); ++t)
                out[(first + t) * rows + row] = sum(total[t]) + (bias ? bias[row] : 0.0f);
        }
}

template <class Weight>
void float_product(const float* x, const Weight& w, const Steps& steps, const float* bias,
                   float* out, int64_t tokens, int64_t rows) {
    if (tokens == 1) weight_only<1>(x, w, steps, bias, out, tokens, rows);
    else weight_only<4>(x, w, steps, bias, out, tokens, rows);
}

}  // namespace

// ---- interface ----------------------------------------------------------------------------------

extern "C" {

// signs null: no rotation. x of `type` (M, K) → codes (M, K), scales (M,).
void smoothq_quantize(const void* x, int type, int64_t tokens, int64_t width, const int8_t* signs,
                      const int8_t* left, int64_t order, int64_t right, int mode, int bits,
                      int64_t group, int largest_multiplier, float clip, const int8_t* multiplier,
                      const float* scale, int8_t* codes, float* scales) {
    const Quantizer q{Mode(mode), bits, group, largest_multiplier, clip, multiplier,
                      scale ? *scale : 0.0f};
    const Rotation r = signs ? rotation_of(signs, left, order, right) : Rotation{};
#pragma omp parallel if (tokens > 1 && tokens * width > SERIAL_WORK)
    {
        std::vector<float> first(width), second(width);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < tokens; ++m) {
            const float* v = row_of(x, Type(type), m, width, first.data());
            if (signs) {
                float* rotated = v == first.data() ? second.data() : first.data();
                float* scratch = v == first.data() ? first.data() : second.data();
                rotate(r, v, rotated, scratch, width);
                v = rotated;
            }
            scales[m] = quantize_token(q, v, width, codes + m * width, first.data());
        }
    }
}

// x of `type` (M, K) → out, of the same type.
void smoothq_rotate(const void* x, int type, int64_t tokens, int64_t width, const int8_t* signs,
                    const int8_t* left, int64_t order, int64_t right, void* out) {
    const Rotation r = rotation_of(signs, left, order, right);
#pragma omp parallel if (tokens > 1 && tokens * width > SERIAL_WORK)
    {
        std::vector<float> first(width), second(width), third(width);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < tokens; ++m) {
            const float* v = row_of(x, Type(type), m, width, first.data());
            rotate(r, v, second.data(), third.data(), width);
            for (int64_t k = 0; k < width; ++k) store(out, Type(type), m * width + k, second[k]);
        }
    }
}

// codes (M, K) by int8 weights (N, K).
void smoothq_int8_gemm(const int8_t* codes, const float* scale, int64_t stride,
                       const int8_t* weight, const float* weight_scale, const float* bias,
                       int64_t tokens, int64_t rows, int64_t width, void* out, int type) {
    const Scaling scaling{scale, stride, weight_scale, bias, out, Type(type), rows};
    product(codes, Bytewise{weight, width, width}, scaling, tokens);
}

// codes (M, K) by packed 4-bit weights (N, ⌈K/2⌉) with multipliers (N, groups) or none.
void smoothq_int4_gemm(const int8_t* codes, const float* scale, int64_t stride,
                       const uint8_t* packed, const float* weight_scale, const int8_t* multiplier,
                       int64_t groups, const float* bias, int64_t tokens, int64_t rows,
                       int64_t width, void* out, int type) {
    const Scaling scaling{scale, stride, weight_scale, bias, out, Type(type), rows};
    const Packed weight{packed, multiplier, width, (width + 1) / 2, width / groups, groups};
    product(codes, weight, scaling, tokens);
}

// totals int32 (M, N), the sums of an integer product, scaled; out float32 may be the same memory.
void smoothq_scale(const void* totals, const float* scale, int64_t stride,
                   const float* weight_scale, const float* bias, int64_t tokens, int64_t rows,
                   void* out, int type) {
    const Scaling scaling{scale, stride, weight_scale, bias, out, Type(type), rows};
#pragma omp parallel for schedule(static) if (tokens * rows > SERIAL_WORK)
    for (int64_t m = 0; m < tokens; ++m) {
        const char* from = static_cast<const char*>(totals) + 4 * m * rows;
#pragma GCC ivdep
        for (int64_t n = 0; n < rows; ++n) {
            int32_t total;
            std::memcpy(&total, from + 4 * n, 4);
            scaling(m, n, total);
        }
    }
}

// 4-bit codes (N, ⌈K/2⌉) with multipliers (N, groups) or none → int8 (N, K), multipliers in them.
void smoothq_unpack(const uint8_t* packed, const int8_t* multiplier, int64_t groups, int64_t rows,
                    int64_t width, int8_t* out) {
    const Packed w{packed, multiplier, width, (width + 1) / 2, width / groups, groups};
    const int64_t half = BLOCK / 2, end = w.group % half ? 0 : width / BLOCK * BLOCK;
#pragma omp parallel for schedule(static) if (rows * width > SERIAL_WORK)
    for (int64_t row = 0; row < rows; ++row) {
        int8_t* to = out + row * width;
        for (int64_t k = 0; k < end; k += BLOCK) {
            const uint8_t* bytes = w.codes + row * w.stride + k / 2;
            const int low = multiplier ? multiplier[row * groups + k / w.group] : 1;
            const int high = multiplier ? multiplier[row * groups + (k + half) / w.group] : 1;
            for (int64_t j = 0; j < half; ++j) {
                to[k + j] = int8_t((int8_t(bytes[j] << 4) >> 4) * low);
                to[k + j + half] = int8_t((int8_t(bytes[j]) >> 4) * high);
            }
        }
        for (int64_t k = end; k < width; ++k) to[k] = int8_t(w.at(row, k));
    }
}

// x float32 (M, K) by packed 4-bit or int8 weights; K a multiple of 64, a group of 32 or 64.
void smoothq_weight_only_gemm(const float* x, const void* codes, int bits, const void* scale,
                              int scale_type, const int8_t* multiplier, int64_t groups,
                              const float* bias, int64_t tokens, int64_t rows, int64_t width,
                              float* out) {
    const Steps steps{scale, Type(scale_type), multiplier, width / groups, groups};
    if (bits == 4) {
        const Packed weight{static_cast<const uint8_t*>(codes), nullptr, width, width / 2, width, 1};
        float_product(x, weight, steps, bias, out, tokens, rows);
    } else {
        float_product(x, Bytewise{static_cast<const int8_t*>(codes), width, width}, steps, bias, out,
                      tokens, rows);
    }
}
}
