// Products of many tokens on the processor's tiles of bfloat16 numbers: `loops.h` includes this.
//
// A float32 is the sum of three bfloat16 numbers, and a code times what its group is multiplied by
// mostly one, so that the products of parts, summed in float32, are as good as float32's. Columns
// stand in pairs, k beside k + 16, in both operands.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BW__)

namespace smoothq {
namespace {

constexpr int64_t TILE = 16;                 // rows of a tile, each 32 numbers
constexpr int64_t TILE_NUMBERS = TILE * 32;
constexpr int MOST_PARTS = 3;

// Two times 16 numbers, as 16 pairs of their upper halves.
inline __m512i paired(__m512i low, __m512i high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
}

// Takes its upper half away from each number: what the parts that follow add up to. An infinity
// has no rest.
inline __m512i rest_of(__m512i bits) {
    const __m512 number = _mm512_castsi512_ps(bits);
    const __m512 upper =
        _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int32_t(0xffff0000))));
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(upper),
                                                _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return _mm512_castps_si512(_mm512_maskz_sub_ps(finite, number, upper));
}

// 32 numbers as pairs, part after part, `stride` numbers from one to the next.
inline void put_parts(__m512i low, __m512i high, int parts, int64_t stride, uint16_t* out) {
    for (int part = 0; part < parts; ++part) {
        _mm512_storeu_si512(out + part * stride, paired(low, high));
        low = rest_of(low), high = rest_of(high);
    }
}

void split(const Split& s, int64_t begin, int64_t end) {
    const int64_t width = s.width, stride = (s.tokens + BAND - 1) / BAND * BAND * width;
    for (int64_t m = begin * BAND; m < end * BAND; ++m)
        for (int64_t k = 0; k < width; k += 2 * LANES) {
            __m512i numbers[2] = {};
            for (int i = 0; i < 2 && m < s.tokens; ++i) {
                const int64_t at = m * width + k + i * LANES;
                if (s.type == Type::FLOAT32)
                    numbers[i] = _mm512_loadu_si512(static_cast<const float*>(s.x) + at);
                else
                    numbers[i] = _mm512_slli_epi32(
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                            static_cast<const uint16_t*>(s.x) + at))), 16);
            }
            const int64_t row = m / BAND * BAND * width + m % BAND / TILE * TILE_NUMBERS;
            put_parts(numbers[0], numbers[1], s.parts, stride,
                      s.out + row + k * BAND + m % TILE * 32);
        }
}

// Columns of 16 rows of 16 pairs, in place.
inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    __m512i u[16];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            u[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
            u[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
        }
    for (int c = 0; c < 4; ++c) {
        const __m512i even[2] = {_mm512_shuffle_i32x4(u[c], u[4 + c], 0x88),
                                 _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd),
                                _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd)};
        r[c] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

// What a row's codes are multiplied by before the product, and its sums after it.
struct RowFactors {
    explicit RowFactors(const ScaledWeight& weight)
        : w(weight), size(w.width / w.groups), after_all(w.groups == 1 && !w.multiplier) {}

    float before(int64_t row, int64_t group) const {
        const int64_t index = row * w.groups + group;
        if (w.multiplier) return w.multiplier[index];
        return load(w.scale, w.scale_type, index);
    }

    float after(int64_t row) const {
        const bool of_row = after_all || w.multiplier;
        return (of_row ? load(w.scale, w.scale_type, row) : 1.0f) * w.tensor_scale;
    }

    // The parts that a code times its factor is the sum of: of floats with 16 bits two, where a
    // multiplier or a scale of 8 bits leaves no more than 8 digits, one.
    int parts() const {
        if (after_all) return 1;
        if (w.multiplier) return w.bytes ? 2 : 1;
        if (w.scale_type == Type::E8M0 || w.scale_type == Type::E4M3) return 1;
        return w.scale_type == Type::BFLOAT16 ? 2 : 3;
    }

    const ScaledWeight& w;
    const int64_t size;
    const bool after_all;
};

// A band of rows from `row` on as tiles: part, step of 32 columns, half of the band, pairs by rows.
template <class Weight>
void tiles_of(const Weight& codes, const RowFactors& factors, int64_t row, int64_t rows, int parts,
              uint16_t* out) {
    const int64_t width = factors.w.width, size = factors.size;
    alignas(64) uint16_t lines[MOST_PARTS][2][BAND][32];
    for (int64_t k = 0; k < width; k += BLOCK) {
        for (int64_t n = 0; n < BAND; ++n) {
            const int64_t from = lower_of(row + n, rows - 1);
            Floats block[4];
            codes_as_floats(codes, from, k, block);
            if (!factors.after_all) {
                if (size >= BLOCK) {
                    const float factor = factors.before(from, k / size);
                    for (int i = 0; i < 4; ++i) block[i] *= factor;
                } else {
                    for (int i = 0; i < 4; ++i)
                        block[i] *= factors.before(from, (k + i * LANES) / size);
                }
            }
            for (int half = 0; half < 2; ++half)
                put_parts(__m512i(block[2 * half]), __m512i(block[2 * half + 1]), parts,
                          2 * BAND * 32, lines[0][half][n]);
        }
        for (int part = 0; part < parts; ++part)
            for (int half = 0; half < 2; ++half)
                for (int tile = 0; tile < 2; ++tile) {
                    __m512i pairs[16];
                    for (int n = 0; n < TILE; ++n)
                        pairs[n] = _mm512_load_si512(lines[part][half][tile * TILE + n]);
                    transpose(pairs);
                    uint16_t* to = out + part * width * BAND + (k + 32 * half) * BAND +
                                   tile * TILE_NUMBERS;
                    for (int n = 0; n < TILE; ++n) _mm512_store_si512(to + 32 * n, pairs[n]);
                }
    }
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

// Sums of a band of tokens by a band of rows, in float32 (BAND, BAND).
inline void band_product(const uint16_t* x, int64_t x_stride, int x_parts, const uint16_t* tiles,
                         int w_parts, int64_t width, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int a = x_parts - 1; a >= 0; --a)
        for (int b = w_parts - 1; b >= 0; --b) {
            if (a + b >= MOST_PARTS) continue;  // below what float32 holds
            const uint16_t* tokens = x + a * x_stride;
            const uint16_t* rows = tiles + b * width * BAND;
            for (int64_t k = 0; k < width; k += 32) {
                _tile_loadd(4, tokens + k * BAND, 64);
                _tile_loadd(6, rows + k * BAND, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, rows + k * BAND + TILE_NUMBERS, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, tokens + k * BAND + TILE_NUMBERS, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    _tile_stored(0, sums, 4 * BAND);
    _tile_stored(1, sums + TILE, 4 * BAND);
    _tile_stored(2, sums + TILE * BAND, 4 * BAND);
    _tile_stored(3, sums + TILE * BAND + TILE, 4 * BAND);
}

// The first `count` of 16 numbers, or all, rounded to nearest where the type has 16 bits.
inline void put_some(void* out, Type type, int64_t at, int64_t count, Floats value) {
    const __mmask16 inside = count < LANES ? (1u << count) - 1 : 0xffff;
    const __m512 numbers(value);
    if (type == Type::FLOAT32)
        return _mm512_mask_storeu_ps(static_cast<float*>(out) + at, inside, numbers);
    const __m512i bits = _mm512_castps_si512(numbers), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(up, is_nan, _mm512_set1_epi32(0x7fc00000));
    _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(out) + at, inside,
                                      _mm512_srli_epi32(rounded, 16));
}

constexpr int64_t HELD_BYTES = 1 << 18;  // of rows that tokens meet while these pass by

void parts_product(const PartsProduct& p, int64_t begin, int64_t end) {
    const int64_t width = p.weight.width, padded = (p.tokens + BAND - 1) / BAND * BAND;
    const RowFactors factors(p.weight);
    const int parts = factors.parts();
    const int64_t numbers = parts * width * BAND;  // of a band
    const int64_t together = higher_of<int64_t>(1, HELD_BYTES / (numbers * 2));
    const Buffer<uint16_t> tiles(together * numbers);
    const Buffer<float> steps(together * BAND), shifts(together * BAND);
    alignas(64) float sums[BAND * BAND];
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t first = begin; first < end; first += together) {
        const int64_t row = first * BAND, bands = lower_of(together, end - first);
        with_codes(p.weight, [&](const auto& codes) {
            for (int64_t band = 0; band < bands; ++band)
                tiles_of(codes, factors, row + band * BAND, p.rows, parts,
                         tiles.data() + band * numbers);
        });
        for (int64_t n = 0; n < bands * BAND; ++n) {
            const int64_t from = lower_of(row + n, p.rows - 1);
            steps[n] = factors.after(from);
            shifts[n] = p.bias ? p.bias[from] : 0.0f;
        }
        for (int64_t m = 0; m < p.tokens; m += BAND)
            for (int64_t band = 0; band < bands * BAND; band += BAND) {
                band_product(p.x + m * width, padded * width, p.parts,
                             tiles.data() + band / BAND * numbers, parts, width, sums);
                const int64_t count = lower_of(BAND, p.rows - row - band);
                for (int64_t t = 0; t < lower_of(BAND, p.tokens - m); ++t)
                    for (int64_t n = 0; n < count; n += LANES)
                        put_some(p.out, p.type, (m + t) * p.rows + row + band + n, count - n,
                                 floats_at(sums + t * BAND + n) * floats_at(&steps[band + n]) +
                                     floats_at(&shifts[band + n]));
            }
    }
    _tile_release();
}

constexpr auto SPLIT = split;
constexpr auto PARTS_PRODUCT = parts_product;

}  // namespace
}  // namespace smoothq

#else

namespace smoothq {
namespace {

constexpr void (*SPLIT)(const Split&, int64_t, int64_t) = nullptr;
constexpr void (*PARTS_PRODUCT)(const PartsProduct&, int64_t, int64_t) = nullptr;

}  // namespace
}  // namespace smoothq

#endif
