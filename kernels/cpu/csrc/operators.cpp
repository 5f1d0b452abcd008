#include "operators.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "isas.h"
#include "threads.h"

namespace smoothq {
namespace {

constexpr int64_t PACKED_TOKENS = 4;  // up to so many, 4-bit weights are faster packed than as int8
constexpr int64_t FLOAT_TOKENS = 32;  // up to so many, floats by packed codes beat a float copy
constexpr int64_t SERIAL_WORK = 1 << 14;  // numbers below which a second thread does not pay

const char* name_of(Number number) {
    switch (number) {
        case Number::INT8: return "int8";
        case Number::UINT8: return "uint8";
        case Number::INT32: return "int32";
        case Number::FLOAT32: return "float32";
        case Number::BFLOAT16: return "bfloat16";
        case Number::FLOAT16: return "float16";
        case Number::FLOAT64: return "float64";
        default: return "another dtype";
    }
}

[[noreturn]] void refuse(const char* name, const View& view, const std::string& needed) {
    std::string shape;
    for (int axis = 0; axis < view.axes; ++axis)
        shape += (axis ? ", " : "") + std::to_string(view.sizes[axis]);
    throw std::invalid_argument(std::string("operand '") + name + "' is " + name_of(view.number) +
                                " (" + shape + ")" + (view.elsewhere ? " on another device" : "") +
                                "; needed: " + needed + " on cpu");
}

float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31;
    uint32_t bits, fraction = half & 1023;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
    else {  // a subnormal is fraction · 2^-24
        const float value = float(fraction) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float number_at(const View& view, int64_t at) {
    switch (view.number) {
        case Number::FLOAT32: return static_cast<const float*>(view.data)[at];
        case Number::FLOAT64: return float(static_cast<const double*>(view.data)[at]);
        case Number::FLOAT16: return from_half(static_cast<const uint16_t*>(view.data)[at]);
        default: {
            const uint32_t bits = uint32_t(static_cast<const uint16_t*>(view.data)[at]) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        }
    }
}

bool is_float(Number number) {
    return number == Number::FLOAT32 || number == Number::BFLOAT16 || number == Number::FLOAT16 ||
           number == Number::FLOAT64;
}

// Calls f(index, offset) for each element of a view, in order.
template <class F>
void walk(const View& view, const F& f) {
    int64_t index[MOST_AXES] = {}, offset = 0;
    const int64_t count = view.elements();
    for (int64_t i = 0; i < count; ++i) {
        f(i, offset);
        for (int axis = view.axes - 1; axis >= 0; --axis) {
            offset += view.strides[axis];
            if (++index[axis] < view.sizes[axis]) break;
            offset -= view.strides[axis] * view.sizes[axis];
            index[axis] = 0;
        }
    }
}

// An operand of floats in float32, contiguous: itself, or a copy that lives as long as this.
class Floats32 {
public:
    Floats32(const char* name, const View& view, int64_t count) {
        if (!view.given) return;
        if (view.elsewhere || !is_float(view.number) || view.elements() != count)
            refuse(name, view, std::to_string(count) + " floats");
        if (view.number == Number::FLOAT32 && view.contiguous()) {
            data_ = static_cast<const float*>(view.data);
            return;
        }
        copy_.resize(count);
        walk(view, [&](int64_t i, int64_t at) { copy_[i] = number_at(view, at); });
        data_ = copy_.data();
    }

    const float* data() const { return data_; }

private:
    std::vector<float> copy_;
    const float* data_ = nullptr;
};

// An operand of codes, contiguous: itself, or a copy that lives as long as this.
template <class T>
class Codes {
public:
    Codes(const char* name, const View& view, Number number, int64_t count) {
        if (!view.given) return;
        if (view.elsewhere || view.number != number || view.elements() != count)
            refuse(name, view, std::to_string(count) + " of " + name_of(number));
        if (view.contiguous()) {
            data_ = static_cast<const T*>(view.data);
            return;
        }
        copy_.resize(count);
        const T* from = static_cast<const T*>(view.data);
        walk(view, [&](int64_t i, int64_t at) { copy_[i] = from[at]; });
        data_ = copy_.data();
    }

    const T* data() const { return data_; }

private:
    std::vector<T> copy_;
    const T* data_ = nullptr;
};

struct Matrix {
    int64_t rows, columns;
};

Matrix matrix_of(const char* name, const View& view) {
    if (view.axes != 2) refuse(name, view, "a matrix");
    return {view.sizes[0], view.sizes[1]};
}

Type type_of(const char* name, const View& view) {
    if (view.number == Number::FLOAT32) return Type::FLOAT32;
    if (view.number == Number::BFLOAT16) return Type::BFLOAT16;
    refuse(name, view, "float32 or bfloat16");
}

void check_out(const View& out, int64_t count) {
    if (!out.contiguous() || out.elements() != count)
        refuse("out", out, std::to_string(count) + " numbers in a row");
}

int64_t groups_of(const char* name, const View& scales, int64_t width) {
    if (!scales.given) return 1;
    const int64_t groups = scales.last();
    if (groups == 0 || width % groups)
        refuse(name, scales, "groups that divide " + std::to_string(width) + " columns");
    return groups;
}

// Whether products on packed codes read a row's groups: whole packed blocks, or halves of one.
bool in_blocks(int64_t width, int64_t groups) {
    const int64_t size = width / groups;
    return groups == 1 || size % BLOCK == 0 || size == BLOCK / 2;
}

// The grain with which a range of `count` pieces of `work` numbers is shared among threads.
int64_t grain(int64_t work) { return 1 + SERIAL_WORK / (work > 0 ? work : 1); }

struct Scales {
    Scales(const View& scale, const View& weight_scale, const View& bias, int64_t tokens,
           int64_t rows)
        : one(scale.elements() == 1),
          token("scale", scale, one ? 1 : tokens),
          row("weight_scale", weight_scale, rows),
          shift("bias", bias, rows) {}

    Scaling scaling(const View& out, int64_t tokens, int64_t rows) const {
        check_out(out, tokens * rows);
        return {token.data(), !one, row.data(), shift.data(), out.data, type_of("out", out), rows};
    }

    bool one;
    Floats32 token, row, shift;
};

struct RotationOperands {
    RotationOperands(const View& signs, const View& left, int64_t right, int64_t width)
        : order(left.given && left.axes ? left.sizes[0] : 0),
          sign("signs", signs, Number::INT8, width),
          factor("left", left, Number::INT8, order * order),
          right(right) {
        if (!signs.given) return;
        // The right factor is Sylvester's matrix, of an order that is a power of two.
        if (!order || right < 1 || right & (right - 1) || width % (order * right))
            throw std::invalid_argument(
                "factors of orders " + std::to_string(order) + " and " + std::to_string(right) +
                " do not rotate rows of " + std::to_string(width) +
                "; the second is a power of two, and their product divides the width");
    }

    Rotation rotation() const { return {sign.data(), factor.data(), order, right}; }

    int64_t order;
    Codes<int8_t> sign, factor;
    int64_t right;
};

// x as the loops read it: float32 or bfloat16, contiguous.
class Inputs {
public:
    explicit Inputs(const View& x)
        : converted_("x",
                     x.number == Number::BFLOAT16 && x.contiguous() && !x.elsewhere ? View{} : x,
                     x.elements()),
          data_(converted_.data() ? static_cast<const void*>(converted_.data()) : x.data),
          type_(converted_.data() ? Type::FLOAT32 : Type::BFLOAT16) {}

    const void* data() const { return data_; }
    Type type() const { return type_; }

private:
    Floats32 converted_;
    const void* data_;
    Type type_;
};

// The largest multiplier of a token's groups: code times multiplier is an int8, the multiplier with
// its sign 4 bits.
int largest_multiplier(int64_t bits) {
    const int fits = 127 / (1 << (bits - 1));
    return fits < 8 ? fits : 8;
}

}  // namespace

Mode mode_of(int64_t number) {
    if (number < 0 || number > int64_t(Mode::GROUPS))
        throw std::invalid_argument(std::to_string(number) + " is no mode of a quantizer");
    return Mode(number);
}

void quantize(const View& x, const Quantizing& how, const View& codes, const View& scales) {
    const int64_t width = x.last(), tokens = width ? x.elements() / width : 0;
    if (how.bits < 2 || how.bits > 8)
        throw std::invalid_argument(std::to_string(how.bits) + "-bit codes do not fit an int8");
    if (how.mode == Mode::GROUPS && (how.group_size < 1 || width % how.group_size))
        throw std::invalid_argument("group_size " + std::to_string(how.group_size) +
                                    " does not divide " + std::to_string(width) + " channels");
    if (how.mode == Mode::SMOOTHED && !how.multiplier.given)
        throw std::invalid_argument("operand 'multiplier' is missing");
    if (how.mode == Mode::STATIC && !how.scale.given)
        throw std::invalid_argument("operand 'scale' is missing");
    const Codes<int8_t> multiplier("multiplier", how.multiplier, Number::INT8, width);
    const Floats32 step("scale", how.scale, 1);
    const RotationOperands rotation(how.signs, how.left, how.right, width);
    check_out(codes, tokens * width);
    check_out(scales, tokens);
    const Inputs inputs(x);
    const Quantize task{inputs.data(),
                        inputs.type(),
                        width,
                        rotation.rotation(),
                        {how.mode, int(how.bits), how.group_size, largest_multiplier(how.bits),
                         float(how.clip), multiplier.data(), step.data() ? *step.data() : 0.0f},
                        static_cast<int8_t*>(codes.data),
                        static_cast<float*>(scales.data)};
    const Table& isa = table();
    in_threads(tokens, grain(width),
               [&](int64_t begin, int64_t end) { isa.quantize(task, begin, end); });
}

void hadamard(const View& x, const View& signs, const View& left, int64_t right, const View& out) {
    const int64_t width = x.last(), tokens = width ? x.elements() / width : 0;
    const RotationOperands rotation(signs, left, right, width);
    check_out(out, x.elements());
    const Inputs inputs(x);
    if (type_of("out", out) != inputs.type()) refuse("out", out, "the dtype of x");
    const Rotate task{inputs.data(), inputs.type(), width, rotation.rotation(), out.data};
    const Table& isa = table();
    in_threads(tokens, grain(width),
               [&](int64_t begin, int64_t end) { isa.rotate(task, begin, end); });
}

bool torch_is_faster(int64_t tokens) { return tokens > table().most_tokens; }

void int8_gemm(const View& codes, const View& scale, const View& weight, const View& weight_scale,
               const View& bias, const View& out) {
    const auto [tokens, width] = matrix_of("codes", codes);
    const int64_t rows = matrix_of("weight", weight).rows;
    const Codes<int8_t> a("codes", codes, Number::INT8, tokens * width);
    const Codes<int8_t> w("weight", weight, Number::INT8, rows * width);
    const Scales scales(scale, weight_scale, bias, tokens, rows);
    const Product task{a.data(), tokens, width, w.data(), nullptr, nullptr, 1,
                       scales.scaling(out, tokens, rows)};
    const Table& isa = table();
    in_threads(rows, grain(width),
               [&](int64_t begin, int64_t end) { isa.product(task, begin, end); });
}

void int4_gemm(const View& codes, const View& scale, const View& packed, const View& weight_scale,
               const View& multiplier, const View& bias, const View& out) {
    const auto [tokens, width] = matrix_of("codes", codes);
    const int64_t rows = matrix_of("packed", packed).rows;
    const int64_t groups = groups_of("multiplier", multiplier, width);
    const Codes<int8_t> a("codes", codes, Number::INT8, tokens * width);
    const Codes<uint8_t> w("packed", packed, Number::UINT8, rows * ((width + 1) / 2));
    const Codes<int8_t> factors("multiplier", multiplier, Number::INT8, rows * groups);
    const Scales scales(scale, weight_scale, bias, tokens, rows);
    const Table& isa = table();
    Product task{a.data(), tokens, width, nullptr, w.data(), factors.data(), groups,
                 scales.scaling(out, tokens, rows)};
    std::vector<int8_t> unpacked;
    if (tokens > PACKED_TOKENS || !in_blocks(width, groups)) {
        unpacked.resize(rows * width);
        const Unpack copy{w.data(), factors.data(), groups, width, unpacked.data()};
        in_threads(rows, grain(width),
                   [&](int64_t begin, int64_t end) { isa.unpack(copy, begin, end); });
        task.bytes = unpacked.data();
    }
    in_threads(rows, grain(width),
               [&](int64_t begin, int64_t end) { isa.product(task, begin, end); });
}

namespace {

// A weight of codes and scales, seen as the loops need it, alive as long as this.
struct WeightOperands {
    WeightOperands(const View& packed, const View& weight_scale, const View& multiplier,
                   int64_t bits, int64_t columns)
        : rows(matrix_of("packed", packed).rows),
          width(columns),
          groups(groups_of(multiplier.given ? "multiplier" : "weight_scale",
                           multiplier.given ? multiplier : weight_scale, columns)),
          bytes("packed", bits == 8 ? packed : View{}, Number::INT8, rows * width),
          nibbles("packed", bits == 4 ? packed : View{}, Number::UINT8, rows * ((width + 1) / 2)),
          factors("multiplier", multiplier, Number::INT8, rows * groups),
          half(weight_scale.number == Number::BFLOAT16 && weight_scale.contiguous() &&
               !weight_scale.elsewhere),
          halves(weight_scale.data),
          steps("weight_scale", half ? View{} : weight_scale, multiplier.given ? rows : rows * groups) {
        if (bits != 4 && bits != 8)
            throw std::invalid_argument(std::to_string(bits) + "-bit weights are neither 4 nor 8");
        const int64_t numbers = multiplier.given ? rows : rows * groups;
        if (half && weight_scale.elements() != numbers)
            refuse("weight_scale", weight_scale, std::to_string(numbers) + " floats");
    }

    ScaledWeight weight() const {
        return {bytes.data(), nibbles.data(), half ? halves : static_cast<const void*>(steps.data()),
                half ? Type::BFLOAT16 : Type::FLOAT32, factors.data(), groups, width};
    }

    int64_t rows, width, groups;
    Codes<int8_t> bytes;
    Codes<uint8_t> nibbles;
    Codes<int8_t> factors;
    bool half;
    const void* halves;
    Floats32 steps;
};

}  // namespace

bool reads_packed_floats(int64_t tokens, int64_t width, int64_t groups) {
    return tokens <= FLOAT_TOKENS && width % BLOCK == 0 && in_blocks(width, groups);
}

void weight_only_gemm(const View& x, const View& packed, const View& weight_scale,
                      const View& multiplier, const View& bias, int64_t bits, const View& out) {
    const auto [tokens, width] = matrix_of("x", x);
    const WeightOperands weight(packed, weight_scale, multiplier, bits, width);
    if (width % BLOCK || !in_blocks(width, weight.groups))
        refuse("x", x, "columns in whole blocks of 64, and groups of whole blocks or of halves");
    const Floats32 inputs("x", x, tokens * width);
    const Floats32 shift("bias", bias, weight.rows);
    check_out(out, tokens * weight.rows);
    if (out.number != Number::FLOAT32) refuse("out", out, "float32");
    const FloatProduct task{inputs.data(), tokens, weight.rows, weight.weight(), shift.data(),
                            static_cast<float*>(out.data)};
    const Table& isa = table();
    in_threads(weight.rows, grain(width),
               [&](int64_t begin, int64_t end) { isa.float_product(task, begin, end); });
}

void dequantize(const View& packed, const View& weight_scale, const View& multiplier, int64_t bits,
                int64_t first, const View& out) {
    const auto [rows, width] = matrix_of("out", out);
    const WeightOperands weight(packed, weight_scale, multiplier, bits, width);
    check_out(out, rows * width);
    if (out.number != Number::FLOAT32) refuse("out", out, "float32");
    if (first < 0 || first + rows > weight.rows) refuse("packed", packed, "the rows of out");
    const Dequantize task{weight.weight(), first, static_cast<float*>(out.data)};
    const Table& isa = table();
    in_threads(rows, grain(width), [&](int64_t begin, int64_t end) {
        isa.dequantize(task, first + begin, first + end);
    });
}

void add_bias(const View& bias, const View& out) {
    const auto [tokens, rows] = matrix_of("out", out);
    const Floats32 shift("bias", bias, rows);
    float* to = static_cast<float*>(out.data);
    for (int64_t m = 0; m < tokens; ++m)
        for (int64_t n = 0; n < rows; ++n) to[m * rows + n] += shift.data()[n];
}

void scaled(const View& totals, const View& scale, const View& weight_scale, const View& bias,
            const View& out) {
    const auto [tokens, rows] = matrix_of("totals", totals);
    const Codes<int32_t> sums("totals", totals, Number::INT32, tokens * rows);
    const Scales scales(scale, weight_scale, bias, tokens, rows);
    const Scale task{sums.data(), scales.scaling(out, tokens, rows)};
    const Table& isa = table();
    in_threads(tokens, grain(rows),
               [&](int64_t begin, int64_t end) { isa.scale(task, begin, end); });
}

void unpack(const View& packed, const View& multiplier, const View& out) {
    const auto [rows, width] = matrix_of("out", out);
    const int64_t groups = groups_of("multiplier", multiplier, width);
    const Codes<uint8_t> w("packed", packed, Number::UINT8, rows * ((width + 1) / 2));
    const Codes<int8_t> factors("multiplier", multiplier, Number::INT8, rows * groups);
    check_out(out, rows * width);
    if (out.number != Number::INT8) refuse("out", out, "int8");
    const Unpack task{w.data(), factors.data(), groups, width, static_cast<int8_t*>(out.data)};
    const Table& isa = table();
    in_threads(rows, grain(width),
               [&](int64_t begin, int64_t end) { isa.unpack(task, begin, end); });
}

}  // namespace smoothq
