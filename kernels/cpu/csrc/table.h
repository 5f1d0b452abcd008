// What an instruction set must provide: the loops of the operators, over a range of tokens or rows.
//
// Row-major matrices; M tokens, N rows of a weight (out_features), K columns (in_features). Every
// code is the one that `reference.py` defines: float32 in the same order, IEEE division, rounding
// half to even. Sums of codes wrap in 32 bits, so that any order gives the same total.

#pragma once

#include <cstdint>

namespace smoothq {

constexpr int64_t BLOCK = 64;  // columns that are packed, and multiplied, together
constexpr int64_t BAND = 32;   // tokens, or rows, of two tiles

enum class Type { FLOAT32, BFLOAT16, E8M0, E4M3 };  // the last two of scales alone
enum class Element { INTEGER, E4M3, E2M1 };         // of a weight's codes
enum class Mode { TOKEN, FULL_RANGE, SMOOTHED, STATIC, GROUPS };
enum class FpScaling { TOKEN, STATIC, GROUP, E8M0, E4M3 };

// x · diag(signs) · (I ⊗ left ⊗ Sylvester's matrix of order `right`) / √(order · right)
struct Rotation {
    const int8_t* signs = nullptr;  // (K,); null: no rotation
    const int8_t* left = nullptr;   // (order, order)
    int64_t order = 0, right = 0;
};

struct Quantizer {
    Mode mode;
    int bits;
    int64_t group;             // GROUPS: channels of one multiplier
    int largest;               // GROUPS: the largest multiplier
    float clip;
    const int8_t* multiplier;  // SMOOTHED: (K,)
    float scale;               // STATIC
};

struct Quantize {
    const void* x;  // (M, K)
    Type type;
    int64_t width;
    Rotation rotation;
    Quantizer quantizer;
    int8_t* codes;  // (M, K)
    float* scales;  // (M,)
};

// Values rounded to floating-point codes, times their scale again.
struct FpQuantize {
    const void* x;  // (M, K)
    Type type;
    int64_t width;
    Element element;
    FpScaling scaling;
    int64_t group;  // GROUP, E8M0, E4M3: channels that share a scale
    float scale;    // STATIC, E4M3: the tensor's
    float* out;     // (M, K)
};

struct Rotate {
    const void* x;  // (M, K)
    Type type;
    int64_t width;
    Rotation rotation;
    void* out;  // (M, K), of the same type
};

// totals · token scale · row scale + bias
struct Scaling {
    const float* token;  // (M,), or one for all where stride is 0
    int64_t stride;
    const float* row;    // (N,)
    const float* bias;   // (N,) or null
    void* out;           // (M, N)
    Type type;
    int64_t rows;
};

// Codes by a weight in bytes, or in packed 4-bit codes times a multiplier a group.
struct Product {
    const int8_t* codes;       // (M, K)
    int64_t tokens, width;
    const int8_t* bytes;       // (N, K), or null
    const uint8_t* packed;     // (N, ⌈K/2⌉)
    const int8_t* multiplier;  // (N, groups) or null
    int64_t groups;
    Scaling scaling;
};

struct Scale {
    const int32_t* totals;  // (M, N); its memory may be the output's
    Scaling scaling;
};

struct Unpack {
    const uint8_t* packed;     // (N, ⌈K/2⌉)
    const int8_t* multiplier;  // (N, groups) or null
    int64_t groups, width;
    int8_t* out;               // (N, K), multipliers in them
};

// Codes of a weight, in bytes, two a byte or in words, and the floats that scale them.
struct ScaledWeight {
    const int8_t* bytes;       // (N, K), or null
    const uint8_t* packed;     // (N, ⌈K/2⌉), or null
    const void* scale;         // (N, groups), or (N, 1) beside multipliers
    Type scale_type;
    const int8_t* multiplier;  // (N, groups) or null
    int64_t groups, width;
    const int32_t* words = nullptr;  // (N, ⌈K·bits/32⌉), of 2, 3, 5, 6 or 7 bits
    int bits = 8;
    Element element = Element::INTEGER;
    float tensor_scale = 1;  // times every scale
};

// Float inputs by such a weight; K a multiple of 64, a group of 16, 32 or of 64s.
struct FloatProduct {
    const float* x;  // (M, K)
    int64_t tokens, rows;
    ScaledWeight weight;
    const float* bias;  // (N,) or null
    float* out;         // (M, N)
};

// Many float inputs by such a weight, as parts of 16 bits that add up to what they stand for.
struct PartsProduct {
    const uint16_t* x;  // bfloat16, as `split` arranges them
    int64_t tokens, rows;
    int parts;
    ScaledWeight weight;
    const float* bias;  // (N,) or null
    void* out;          // (M, N)
    Type type;
};

struct Split {
    const void* x;  // (M, K)
    Type type;
    int64_t tokens, width;
    int parts;
    uint16_t* out;  // part, band, step of 32 columns, tile; what is behind the tokens is zero
};

// Rows of such a weight, of any width, as floats.
struct Dequantize {
    ScaledWeight weight;
    int64_t first;  // the row that comes first in `out`
    float* out;     // (rows, K)
};

// Rows of a cache: the codes of all groups, their scales, their offsets (both float16). A byte of 4-bit
// codes has number j of the group's first half below and of its second half above.
struct Expand {
    const uint8_t* rows;  // (R, row_bytes)
    int64_t row_bytes, width, group;
    int bits;
    float* out;  // (R, width): code · scale + offset
};

// Each function works on the tokens, or the rows, of [begin, end).
struct Table {
    const char* name;
    int64_t most_tokens;  // for which `product` is faster than PyTorch's int8 product
    void (*quantize)(const Quantize&, int64_t begin, int64_t end);           // tokens
    void (*fp_quantize)(const FpQuantize&, int64_t begin, int64_t end);      // tokens
    void (*rotate)(const Rotate&, int64_t begin, int64_t end);               // tokens
    void (*product)(const Product&, int64_t begin, int64_t end);             // rows
    void (*scale)(const Scale&, int64_t begin, int64_t end);                 // tokens
    void (*unpack)(const Unpack&, int64_t begin, int64_t end);               // rows
    void (*float_product)(const FloatProduct&, int64_t begin, int64_t end);  // rows
    void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);       // rows
    void (*expand)(const Expand&, int64_t begin, int64_t end);               // rows
    // Null where no instruction multiplies tiles of 16 bits.
    void (*split)(const Split&, int64_t begin, int64_t end);                 // bands of tokens
    void (*parts_product)(const PartsProduct&, int64_t begin, int64_t end);  // bands of rows
};

}  // namespace smoothq
