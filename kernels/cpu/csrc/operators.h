// The operators on tensors that are only looked at: what is checked, converted, and run in threads.
//
// Two doors lead here: the registered operators (`library.cpp`) and the direct calls from Python
// (`python.cpp`). Each says how its tensors are seen and makes the outputs.
//
// All throw std::invalid_argument, which names the operand, for another dtype or size than is
// needed. Nothing is read or written beyond what a View says.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "table.h"

namespace smoothq {

enum class Number { INT8, UINT8, INT32, INT64, BOOL, FLOAT32, BFLOAT16, FLOAT16, FLOAT64, OTHER };

constexpr int MOST_AXES = 8;

// A tensor in the CPU's memory that somebody else owns; without data it stands for None.
struct View {
    void* data = nullptr;
    Number number = Number::OTHER;
    int axes = 0;
    int64_t sizes[MOST_AXES] = {};
    int64_t strides[MOST_AXES] = {};  // in elements
    bool given = false;
    bool elsewhere = false;  // in another device's memory

    int64_t elements() const {
        int64_t product = 1;
        for (int axis = 0; axis < axes; ++axis) product *= sizes[axis];
        return product;
    }

    bool contiguous() const {
        if (elements() == 0) return true;
        int64_t stride = 1;
        for (int axis = axes - 1; axis >= 0; --axis) {
            if (sizes[axis] != 1 && strides[axis] != stride) return false;
            stride *= sizes[axis];
        }
        return true;
    }

    int64_t last() const { return axes ? sizes[axes - 1] : 1; }
};

struct Quantizing {
    Mode mode;
    int64_t bits;
    double clip;
    int64_t group_size;  // of GROUPS
    View multiplier;     // of SMOOTHED
    View scale;          // of STATIC
    View signs, left;    // of a rotation before, or none
    int64_t right;       // its power of two
};

// The mode of a number of Mode. Throws for a number that is none.
Mode mode_of(int64_t number);

// x (..., K) → codes int8 (..., K), scales float32 (..., 1).
void quantize(const View& x, const Quantizing& how, const View& codes, const View& scales);

// x (..., K) → out, of the same shape and dtype.
void hadamard(const View& x, const View& signs, const View& left, int64_t right, const View& out);

// Whether PyTorch's own int8 product is faster than the loops of this instruction set for so many
// tokens; `scaled` completes it.
bool torch_is_faster(int64_t tokens);

// The most tokens for which it is not.
int64_t most_tokens();

// As in `reference.py`. out (M, N), float32 or bfloat16.
void int8_gemm(const View& codes, const View& scale, const View& weight, const View& weight_scale,
               const View& bias, const View& out);
void int4_gemm(const View& codes, const View& scale, const View& packed, const View& weight_scale,
               const View& multiplier, const View& bias, const View& out);

// The weight of one expert, and what scales it: packed codes where it is uint8.
struct Expert {
    View weight, scale, multiplier, bias;
};

// How many rows each expert has: what lies between two of the ends (E,). Throws for ends that fall, or
// that lie beyond `rows`.
std::vector<int64_t> rows_of_experts(const View& ends, int64_t rows);

// Rows of codes, sorted by expert, by the weights of their experts; zeros behind the last. Experts
// with more than `most` rows are left out: their part of `out` is not written.
void expert_gemm(const View& codes, const View& scale, const std::vector<int64_t>& counts,
                 const std::vector<Expert>& experts, int64_t most, const View& out);

// The codes of a weight and the floats that scale them, as in `reference.py`: integers of `bits`, or
// floating-point codes, whose scales may be bytes. With these a tensor scale makes them E4M3.
struct CodedWeight {
    View packed, scale, multiplier, tensor_scale;
    int64_t bits = 0;
    Element element = Element::INTEGER;

    int64_t groups() const { return (multiplier.given ? multiplier : scale).last(); }
};

// The format that "e4m3" or "e2m1" names. Throws for another name.
Element element_of(const std::string& name);

// x (M, K) by the weight, out (M, N) float32.
void float_product(const View& x, const CodedWeight& weight, const View& bias, const View& out);

// Whether `float_product` is for so many tokens and such groups: else `tile_product`, where there is
// one, or a float copy, made by `dequantize`, is faster, or the only way.
bool reads_packed_floats(int64_t tokens, int64_t width, int64_t groups);
bool reads_packed_floats(int64_t tokens, int64_t width, const Expert& expert);

// Rows of floats, sorted by expert, by the weights of their experts, of `bits` a code; zeros behind
// the last. Experts whose packed codes are not read are left out: their part of `out` is not written.
void expert_weight_only_gemm(const View& x, const std::vector<int64_t>& counts,
                             const std::vector<Expert>& experts, int64_t bits, const View& out);

// Whether the processor multiplies tiles, and so wide a weight in such groups fills them.
bool has_tiles(int64_t width, int64_t groups);

// The same for many tokens; out float32 or bfloat16.
void tile_product(const View& x, const CodedWeight& weight, const View& bias, const View& out);

// Rows `first` … of a weight as float32 out (rows, K).
void dequantize(const CodedWeight& weight, int64_t first, const View& out);

// The element and the scaling of their numbers. Throws for numbers that are none.
struct FpQuantizing {
    FpQuantizing(int64_t element, int64_t scaling, int64_t group_size, const View& tensor_scale);

    Element element;
    FpScaling scaling;
    int64_t group_size;  // of GROUP, E8M0, E4M3
    View tensor_scale;   // of STATIC, E4M3
};

// x (..., K) → out, of the same shape, float32.
void fp_quantize(const View& x, const FpQuantizing& how, const View& out);

// out float32 (M, N), times the tokens' scales, plus the bias (N,), where these are given.
void finish(const View& scale, const View& bias, const View& out);

// codes (B, L, K) as float32 out (B, L, K): each times its block's scale (B, K / group size), at the
// column that it multiplies, order (B, K), where these are given.
void place(const View& codes, const View& block_scale, const View& order, int64_t group_size,
           const View& out);

// The numbers in a row of a cache; group_size 0 for one group.
int64_t row_width(const View& rows, int64_t bits, int64_t group_size);

// Rows of a cache (B, H, T, bytes), group_size 0 for one group, as float32 out (B, H, T, D); the
// first tokens (B, H, N, D) stand from start (B,) on, where these are given.
void expand(const View& rows, int64_t bits, int64_t group_size, const View& first,
            const View& start, const View& out);

// Rows of one head (T, bytes), one group each, as int8 codes (T, D) and float32 (T,) both.
void split(const View& rows, int64_t bits, const View& codes, const View& scales,
           const View& offsets);

// The scores of queries (L, D) and keys (T, D) in codes, float32 out (L, T), −∞ where the mask (L, T)
// is false. Returns the queries that see nothing.
std::vector<int64_t> scores(const View& codes, const View& scale, const View& keys,
                            const View& key_scales, const View& key_offsets, const View& mask,
                            double scaling, const View& out);

// totals int32 (M, N), times both scales, plus the bias; out may be their memory.
void scaled(const View& totals, const View& scale, const View& weight_scale, const View& bias,
            const View& out);

// packed (N, ⌈K/2⌉) → out int8 (N, K), multipliers in them.
void unpack(const View& packed, const View& multiplier, const View& out);

}  // namespace smoothq
