#include "operators.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "isas.h"
#include "numbers.h"
#include "threads.h"

namespace smoothq {
namespace {

constexpr int64_t PACKED_TOKENS = 4;  // up to so many, 4-bit weights are faster packed than as int8
constexpr int64_t FLOAT_TOKENS = 32;  // up to so many, floats by packed codes beat a float copy
constexpr int64_t FEW_TOKENS = 12;    // up to so many, they beat tiles
constexpr int64_t ROW_WORK = 4;  // reading an expert's row costs as much as multiplying these tokens
constexpr int64_t SERIAL_WORK = 1 << 14;  // numbers below which a second thread does not pay

const char* name_of(Number number) {
    switch (number) {
        case Number::INT8: return "int8";
        case Number::UINT8: return "uint8";
        case Number::INT32: return "int32";
        case Number::INT64: return "int64";
        case Number::BOOL: return "bool";
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

float number_at(const View& view, int64_t at) {
    switch (view.number) {
        case Number::FLOAT32: return static_cast<const float*>(view.data)[at];
        case Number::FLOAT64: return float(static_cast<const double*>(view.data)[at]);
        case Number::FLOAT16: return from_float16(static_cast<const uint16_t*>(view.data)[at]);
        default: return from_bfloat16(static_cast<const uint16_t*>(view.data)[at]);
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

// An operand of floats as the loops read it: bfloat16 that is contiguous is left as it is.
class Inputs {
public:
    Inputs(const char* name, const View& view, int64_t count)
        : half_(view.number == Number::BFLOAT16 && view.contiguous() && !view.elsewhere),
          halves_(view.data),
          floats_(name, half_ ? View{} : view, count) {
        if (half_ && view.elements() != count)
            refuse(name, view, std::to_string(count) + " floats");
    }

    const void* data() const { return half_ ? halves_ : floats_.data(); }
    Type type() const { return half_ ? Type::BFLOAT16 : Type::FLOAT32; }

private:
    bool half_;
    const void* halves_;
    Floats32 floats_;
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
// Those of floats read quarters too.
bool in_blocks(int64_t width, int64_t groups) {
    const int64_t size = width / groups;
    return groups == 1 || size % BLOCK == 0 || size == BLOCK / 2;
}

bool in_float_blocks(int64_t width, int64_t groups) {
    return width % BLOCK == 0 && (in_blocks(width, groups) || width / groups == BLOCK / 4);
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

// The largest multiplier of a token's groups: code times multiplier is an int8, the multiplier with
// its sign 4 bits.
int largest_multiplier(int64_t bits) {
    const int fits = 127 / (1 << (bits - 1));
    return fits < 8 ? fits : 8;
}

}  // namespace

FpQuantizing::FpQuantizing(int64_t element, int64_t scaling, int64_t group_size,
                           const View& tensor_scale)
    : element(Element(element)), scaling(FpScaling(scaling)), group_size(group_size),
      tensor_scale(tensor_scale) {
    if (element < int64_t(Element::E4M3) || element > int64_t(Element::E2M1))
        throw std::invalid_argument(std::to_string(element) + " is no floating-point element");
    if (scaling < 0 || scaling > int64_t(FpScaling::E4M3))
        throw std::invalid_argument(std::to_string(scaling) + " is no scaling");
}

void fp_quantize(const View& x, const FpQuantizing& how, const View& out) {
    const int64_t width = x.last(), tokens = width ? x.elements() / width : 0;
    const bool grouped = how.scaling >= FpScaling::GROUP;
    if (grouped && how.group_size < 1)
        throw std::invalid_argument("group_size " + std::to_string(how.group_size) +
                                    " is not a number of channels");
    const bool scaled = how.scaling == FpScaling::STATIC || how.scaling == FpScaling::E4M3;
    if (scaled && !how.tensor_scale.given)
        throw std::invalid_argument("operand 'tensor_scale' is missing");
    const Floats32 scale("tensor_scale", scaled ? how.tensor_scale : View{}, 1);
    check_out(out, x.elements());
    if (out.number != Number::FLOAT32) refuse("out", out, "float32");
    const Inputs inputs("x", x, x.elements());
    const FpQuantize task{inputs.data(),  inputs.type(),
                          width,          how.element,
                          how.scaling,    how.group_size,
                          scaled ? *scale.data() : 1.0f, static_cast<float*>(out.data)};
    const Table& isa = table();
    in_threads(tokens, grain(width),
               [&](int64_t begin, int64_t end) { isa.fp_quantize(task, begin, end); });
}

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
    const Inputs inputs("x", x, x.elements());
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
    const Inputs inputs("x", x, x.elements());
    if (type_of("out", out) != inputs.type()) refuse("out", out, "the dtype of x");
    const Rotate task{inputs.data(), inputs.type(), width, rotation.rotation(), out.data};
    const Table& isa = table();
    in_threads(tokens, grain(width),
               [&](int64_t begin, int64_t end) { isa.rotate(task, begin, end); });
}

bool torch_is_faster(int64_t tokens) { return tokens > most_tokens(); }

int64_t most_tokens() { return table().most_tokens; }

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

std::vector<int64_t> rows_of_experts(const View& ends, int64_t rows) {
    const int64_t experts = ends.elements();
    const Codes<int64_t> at("ends", ends, Number::INT64, experts);
    std::vector<int64_t> counts;
    int64_t before = 0;
    for (int64_t expert = 0; expert < experts; ++expert) {
        const int64_t end = at.data()[expert];
        if (end < before || end > rows)
            refuse("ends", ends, "numbers that rise to " + std::to_string(rows) + " at most");
        counts.push_back(end - before);
        before = end;
    }
    return counts;
}

namespace {

// The rows of several weights, shared among threads by what they cost.
class SharedRows {
public:
    // Rows of one more weight, which so many tokens meet.
    void add(int64_t rows, int64_t tokens) {
        parts_.push_back({work_, rows, tokens + ROW_WORK});
        work_ += rows * (tokens + ROW_WORK);
    }

    // Calls f(weight, from, to) for all rows, which are `width` numbers long.
    template <class F>
    void run(int64_t width, const F& f) const {
        in_threads(work_, grain(width) * (1 + ROW_WORK), [&](int64_t begin, int64_t end) {
            for (size_t i = 0; i < parts_.size(); ++i) {
                const int64_t from = parts_[i].row_at(begin), to = parts_[i].row_at(end);
                if (from < to) f(i, from, to);
            }
        });
    }

private:
    struct Part {
        int64_t begin, rows, cost;  // where it begins in the work of all; a row's cost

        // The first row whose work begins at a place or behind it.
        int64_t row_at(int64_t at) const {
            const int64_t row = at <= begin ? 0 : (at - begin + cost - 1) / cost;
            return row < rows ? row : rows;
        }
    };

    std::vector<Part> parts_;
    int64_t work_ = 0;
};

void check_experts(const std::vector<Expert>& experts, const std::vector<int64_t>& counts) {
    if (experts.size() != counts.size())
        throw std::invalid_argument(std::to_string(experts.size()) + " weights for " +
                                    std::to_string(counts.size()) + " ends");
}

// Zeros in the rows of out (M, N), float32 or bfloat16, from `first` on.
void clear_behind(const View& out, int64_t first) {
    const int64_t size = out.last() * (out.number == Number::BFLOAT16 ? 2 : 4);
    __builtin_memset(static_cast<char*>(out.data) + first * size, 0,
                     (out.sizes[0] - first) * size);
}

// The product of one expert's rows, with the operands that it needs.
struct ExpertProduct {
    ExpertProduct(const View& a, const View& scale, int64_t first, int64_t tokens, const Expert& e,
                  const View& out)
        : width(a.sizes[1]),
          rows(matrix_of("weight", e.weight).rows),
          groups(groups_of("multiplier", packed(e) ? e.multiplier : View{}, width)),
          bytes("weight", packed(e) ? View{} : e.weight, Number::INT8, rows * width),
          nibbles("weight", packed(e) ? e.weight : View{}, Number::UINT8,
                  rows * ((width + 1) / 2)),
          factors("multiplier", packed(e) ? e.multiplier : View{}, Number::INT8, rows * groups),
          scales(scale, e.scale, e.bias, a.sizes[0], rows) {
        if (out.last() != rows) refuse("weight", e.weight, std::to_string(out.last()) + " rows");
        const int64_t size = out.number == Number::BFLOAT16 ? 2 : 4;
        Scaling scaling = scales.scaling(out, a.sizes[0], rows);
        scaling.token += first * scaling.stride;
        scaling.out = static_cast<char*>(out.data) + first * rows * size;
        task = {static_cast<const int8_t*>(a.data) + first * width,
                tokens, width, bytes.data(), nibbles.data(), factors.data(), groups, scaling};
        if (!packed(e) || (tokens <= PACKED_TOKENS && in_blocks(width, groups))) return;
        unpacked.resize(rows * width);
        const Unpack copy{nibbles.data(), factors.data(), groups, width, unpacked.data()};
        const Table& isa = table();
        in_threads(rows, grain(width),
                   [&](int64_t begin, int64_t end) { isa.unpack(copy, begin, end); });
        task.bytes = unpacked.data();
    }
    ExpertProduct(const ExpertProduct&) = delete;

    static bool packed(const Expert& e) { return e.weight.number == Number::UINT8; }

    int64_t width, rows, groups;
    Codes<int8_t> bytes;
    Codes<uint8_t> nibbles;
    Codes<int8_t> factors;
    Scales scales;
    std::vector<int8_t> unpacked;
    Product task;
};

}  // namespace

void expert_gemm(const View& codes, const View& scale, const std::vector<int64_t>& counts,
                 const std::vector<Expert>& experts, int64_t most, const View& out) {
    const int64_t width = matrix_of("codes", codes).columns;
    check_experts(experts, counts);
    if (codes.number != Number::INT8 || codes.elsewhere || !codes.contiguous())
        refuse("codes", codes, "int8 in a row");
    std::vector<std::unique_ptr<ExpertProduct>> products;
    SharedRows rows;
    int64_t first = 0;
    for (size_t expert = 0; expert < experts.size(); ++expert) {
        const int64_t count = counts[expert];
        if (count && count <= most) {
            products.push_back(std::make_unique<ExpertProduct>(codes, scale, first, count,
                                                               experts[expert], out));
            rows.add(products.back()->rows, count);
        }
        first += count;
    }
    clear_behind(out, first);
    const Table& isa = table();
    rows.run(width, [&](size_t i, int64_t from, int64_t to) {
        isa.product(products[i]->task, from, to);
    });
}

namespace {

// A weight of codes and scales, seen as the loops need it, alive as long as this.
struct WeightOperands {
    WeightOperands(const View& packed, const View& weight_scale, const View& multiplier,
                   int64_t bits, int64_t columns)
        : WeightOperands({packed, weight_scale, multiplier, {}, bits}, columns) {}

    WeightOperands(const CodedWeight& w, int64_t columns)
        : element(w.element),
          bits(w.bits),
          rows(matrix_of("packed", w.packed).rows),
          width(columns),
          groups(groups_of(w.multiplier.given ? "multiplier" : scale_name(),
                           w.multiplier.given ? w.multiplier : w.scale, columns)),
          bytes("packed", of(element == Element::INTEGER && bits == 8, w.packed), Number::INT8,
                rows * width),
          nibbles("packed", of(element == Element::E2M1 || bits == 4, w.packed), Number::UINT8,
                  rows * ((width + 1) / 2)),
          float_bytes("packed", of(element == Element::E4M3, w.packed), Number::UINT8,
                      rows * width),
          words("packed", of(in_words(), w.packed), Number::INT32,
                rows * ((width * bits + 31) / 32)),
          factors("multiplier", w.multiplier, Number::INT8, rows * groups),
          steps(scale_name(), of(!in_bytes(w), w.scale), w.multiplier.given ? rows : rows * groups),
          step_bytes(scale_name(), of(in_bytes(w), w.scale), Number::UINT8, rows * groups),
          tensor_scale("tensor_scale", of(in_bytes(w), w.tensor_scale), 1) {
        if (element == Element::INTEGER && (bits < 2 || bits > 8))
            throw std::invalid_argument(std::to_string(bits) + "-bit weights are not 2 to 8 bits");
    }

    ScaledWeight weight() const {
        const float* tensor = tensor_scale.data();
        const uint8_t* bytes_of_scale = step_bytes.data();
        const Type type = !bytes_of_scale ? steps.type() : tensor ? Type::E4M3 : Type::E8M0;
        return {float_bytes.data() ? reinterpret_cast<const int8_t*>(float_bytes.data())
                                   : bytes.data(),
                nibbles.data(),
                bytes_of_scale ? bytes_of_scale : steps.data(),
                type,
                factors.data(),
                groups,
                width,
                words.data(),
                int(bits),
                element,
                tensor ? *tensor : 1.0f};
    }

    Element element;
    int64_t bits, rows, width, groups;
    Codes<int8_t> bytes;
    Codes<uint8_t> nibbles, float_bytes;
    Codes<int32_t> words;
    Codes<int8_t> factors;
    Inputs steps;
    Codes<uint8_t> step_bytes;
    Floats32 tensor_scale;

private:
    static View of(bool given, const View& view) { return given ? view : View{}; }

    static bool in_bytes(const CodedWeight& w) {
        return w.element != Element::INTEGER && w.scale.number == Number::UINT8;
    }

    const char* scale_name() const {
        return element == Element::INTEGER ? "weight_scale" : "scale";
    }

    bool in_words() const {
        return element == Element::INTEGER && bits >= 2 && bits < 8 && bits != 4;
    }
};

}  // namespace

bool reads_packed_floats(int64_t tokens, int64_t width, int64_t groups) {
    return tokens <= (table().parts_product ? FEW_TOKENS : FLOAT_TOKENS) &&
           in_float_blocks(width, groups);
}

bool has_tiles(int64_t width, int64_t groups) {
    return table().parts_product && in_float_blocks(width, groups);
}

Element element_of(const std::string& name) {
    if (name == "e4m3") return Element::E4M3;
    if (name == "e2m1") return Element::E2M1;
    throw std::invalid_argument("element '" + name + "' is neither e4m3 nor e2m1");
}

void float_product(const View& x, const CodedWeight& coded, const View& bias, const View& out) {
    const auto [tokens, width] = matrix_of("x", x);
    const WeightOperands weight(coded, width);
    if (!in_float_blocks(width, weight.groups))
        refuse("x", x, "columns in whole blocks of 64, and groups of blocks, halves or quarters");
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

void tile_product(const View& x, const CodedWeight& coded, const View& bias, const View& out) {
    const auto [tokens, width] = matrix_of("x", x);
    const WeightOperands weight(coded, width);
    const Table& isa = table();
    if (!has_tiles(width, weight.groups))
        refuse("x", x, "columns in whole blocks of 64, and a processor with tiles");
    const Inputs inputs("x", x, tokens * width);
    const Floats32 shift("bias", bias, weight.rows);
    check_out(out, tokens * weight.rows);
    const int parts = inputs.type() == Type::BFLOAT16 ? 1 : 3;
    const int64_t token_bands = (tokens + BAND - 1) / BAND;
    const size_t size = size_t(parts * token_bands * BAND * width) * sizeof(uint16_t);
    const std::unique_ptr<void, decltype(&std::free)> pairs(std::aligned_alloc(64, size),
                                                            std::free);
    if (!pairs) throw std::bad_alloc();
    const Split arranged{inputs.data(), inputs.type(), tokens, width, parts,
                         static_cast<uint16_t*>(pairs.get())};
    in_threads(token_bands, grain(width * BAND),
               [&](int64_t begin, int64_t end) { isa.split(arranged, begin, end); });
    const PartsProduct task{arranged.out,    tokens,       weight.rows, parts,
                            weight.weight(), shift.data(), out.data,    type_of("out", out)};
    in_threads((weight.rows + BAND - 1) / BAND, 1,
               [&](int64_t begin, int64_t end) { isa.parts_product(task, begin, end); });
}

bool reads_packed_floats(int64_t tokens, int64_t width, const Expert& expert) {
    const int64_t groups = (expert.multiplier.given ? expert.multiplier : expert.scale).last();
    return groups > 0 && reads_packed_floats(tokens, width, groups);
}

namespace {

// The product of one expert's rows of floats, with the operands that it needs.
struct ExpertFloatProduct {
    ExpertFloatProduct(const float* x, int64_t tokens, int64_t width, const Expert& e, int64_t bits,
                       float* out)
        : weight(e.weight, e.scale, e.multiplier, bits, width),
          shift("bias", e.bias, weight.rows),
          task{x, tokens, weight.rows, weight.weight(), shift.data(), out} {}
    ExpertFloatProduct(const ExpertFloatProduct&) = delete;

    WeightOperands weight;
    Floats32 shift;
    FloatProduct task;
};

}  // namespace

void expert_weight_only_gemm(const View& x, const std::vector<int64_t>& counts,
                             const std::vector<Expert>& experts, int64_t bits, const View& out) {
    const auto [tokens, width] = matrix_of("x", x);
    check_experts(experts, counts);
    check_out(out, tokens * out.last());
    if (out.number != Number::FLOAT32) refuse("out", out, "float32");
    const Floats32 inputs("x", x, tokens * width);
    float* to = static_cast<float*>(out.data);
    std::vector<std::unique_ptr<ExpertFloatProduct>> products;
    SharedRows rows;
    int64_t first = 0;
    for (size_t expert = 0; expert < experts.size(); ++expert) {
        const int64_t count = counts[expert];
        if (count && reads_packed_floats(count, width, experts[expert])) {
            products.push_back(std::make_unique<ExpertFloatProduct>(
                inputs.data() + first * width, count, width, experts[expert], bits,
                to + first * out.last()));
            const int64_t found = products.back()->weight.rows;
            if (found != out.last())
                refuse("packed", experts[expert].weight, std::to_string(out.last()) + " rows");
            rows.add(found, count);
        }
        first += count;
    }
    clear_behind(out, first);
    const Table& isa = table();
    rows.run(width, [&](size_t i, int64_t from, int64_t end) {
        isa.float_product(products[i]->task, from, end);
    });
}

void dequantize(const CodedWeight& coded, int64_t first, const View& out) {
    const auto [rows, width] = matrix_of("out", out);
    const WeightOperands weight(coded, width);
    check_out(out, rows * width);
    if (out.number != Number::FLOAT32) refuse("out", out, "float32");
    if (first < 0 || first + rows > weight.rows) refuse("packed", coded.packed, "the rows of out");
    const Dequantize task{weight.weight(), first, static_cast<float*>(out.data)};
    const Table& isa = table();
    in_threads(rows, grain(width), [&](int64_t begin, int64_t end) {
        isa.dequantize(task, first + begin, first + end);
    });
}

void finish(const View& scale, const View& bias, const View& out) {
    const auto [tokens, rows] = matrix_of("out", out);
    const bool one = scale.elements() == 1;
    const Floats32 steps("scale", scale, one ? 1 : tokens), shift("bias", bias, rows);
    float* to = static_cast<float*>(out.data);
    const int64_t width = rows;
    in_threads(tokens, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            const float step = steps.data() ? steps.data()[one ? 0 : m] : 1.0f;
            for (int64_t n = 0; n < width; ++n) {
                const float product = to[m * width + n] * step;
                to[m * width + n] = shift.data() ? product + shift.data()[n] : product;
            }
        }
    });
}

void place(const View& codes, const View& block_scale, const View& order, int64_t group_size,
           const View& out) {
    if (codes.axes != 3) refuse("codes", codes, "three axes");
    const int64_t batch = codes.sizes[0], length = codes.sizes[1], width = codes.sizes[2];
    if (group_size < 1 || width % group_size)
        throw std::invalid_argument("group_size " + std::to_string(group_size) +
                                    " does not divide " + std::to_string(width) + " columns");
    const Codes<int8_t> from("codes", codes, Number::INT8, batch * length * width);
    const Floats32 factors("block_scale", block_scale, batch * (width / group_size));
    const Codes<int64_t> columns("order", order, Number::INT64, batch * width);
    check_out(out, batch * length * width);
    for (int64_t i = 0; columns.data() && i < batch * width; ++i)
        if (columns.data()[i] < 0 || columns.data()[i] >= width)
            refuse("order", order, "columns below " + std::to_string(width));
    float* to = static_cast<float*>(out.data);
    in_threads(batch * length, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            const int64_t b = m / length;
            const int8_t* row = from.data() + m * width;
            const int64_t* column = columns.data() ? columns.data() + b * width : nullptr;
            for (int64_t k = 0; k < width; ++k) {
                const float factor =
                    factors.data() ? factors.data()[(b * width + k) / group_size] : 1.0f;
                to[m * width + (column ? column[k] : k)] = row[k] * factor;
            }
        }
    });
}

int64_t row_width(const View& rows, int64_t bits, int64_t group_size) {
    if (bits != 4 && bits != 8)
        throw std::invalid_argument(std::to_string(bits) + "-bit rows are neither 4 nor 8");
    const int64_t bytes = rows.last();
    const int64_t width = group_size ? bytes * 8 * group_size / (bits * group_size + 32)
                                     : (bytes - 4) * 8 / bits;
    const int64_t group = group_size ? group_size : width;
    if (group < 1 || width % group || group * bits % 8 ||
        width * bits / 8 + 4 * (width / group) != bytes)
        refuse("rows", rows, "codes of " + std::to_string(bits) + " bits and two floats a group");
    return width;
}

void expand(const View& rows, int64_t bits, int64_t group_size, const View& first,
            const View& start, const View& out) {
    const int64_t width = row_width(rows, bits, group_size);
    if (rows.axes != 4) refuse("rows", rows, "four axes");
    const int64_t heads = rows.sizes[1], tokens = rows.sizes[2], lines = rows.sizes[0] * heads;
    const Codes<uint8_t> from("rows", rows, Number::UINT8, rows.elements());
    check_out(out, lines * tokens * width);
    float* to = static_cast<float*>(out.data);
    const int64_t group = group_size ? group_size : width;
    const Expand task{from.data(), rows.last(), width, group, int(bits), to};
    const Table& isa = table();
    in_threads(lines * tokens, grain(width),
               [&](int64_t begin, int64_t end) { isa.expand(task, begin, end); });
    if (!first.given || !start.given) return;
    if (first.axes != 4) refuse("first tokens", first, "four axes");
    const int64_t kept = first.sizes[2];
    const Floats32 floats("first tokens", first, lines * kept * width);
    const Codes<int64_t> starts("start", start, Number::INT64, rows.sizes[0]);
    for (int64_t line = 0; line < lines; ++line)
        for (int64_t i = 0; i < kept; ++i) {
            const int64_t token = starts.data()[line / heads] + i;
            if (token < 0 || token >= tokens) continue;
            const float* one = floats.data() + (line * kept + i) * width;
            for (int64_t k = 0; k < width; ++k) to[(line * tokens + token) * width + k] = one[k];
        }
}

void split(const View& rows, int64_t bits, const View& codes, const View& scales,
           const View& offsets) {
    const auto [tokens, bytes] = matrix_of("rows", rows);
    const int64_t width = row_width(rows, bits, 0);
    const Codes<uint8_t> from("rows", rows, Number::UINT8, tokens * bytes);
    check_out(codes, tokens * width);
    int8_t* to = static_cast<int8_t*>(codes.data);
    float* floats[] = {static_cast<float*>(scales.data), static_cast<float*>(offsets.data)};
    for (int64_t t = 0; t < tokens; ++t) {
        const uint8_t* row = from.data() + t * bytes;
        const int64_t half = width / 2;
        for (int64_t k = 0; k < width; ++k)
            to[t * width + k] =
                bits == 8 ? int8_t(row[k])
                          : int8_t(int8_t(k < half ? row[k] << 4 : row[k - half]) >> 4);
        for (int i = 0; i < 2; ++i) {
            const uint8_t* at = row + width * bits / 8 + 2 * i;
            floats[i][t] = from_float16(uint16_t(at[0] | at[1] << 8));
        }
    }
}

std::vector<int64_t> scores(const View& codes, const View& scale, const View& keys,
                            const View& key_scales, const View& key_offsets, const View& mask,
                            double scaling, const View& out) {
    const auto [queries, width] = matrix_of("codes", codes);
    const int64_t tokens = matrix_of("keys", keys).rows;
    const Codes<int8_t> a("codes", codes, Number::INT8, queries * width);
    const Codes<int8_t> k("keys", keys, Number::INT8, tokens * width);
    const Floats32 given("scale", scale, queries);
    const Floats32 steps("key scales", key_scales, tokens);
    const Floats32 shifts("key offsets", key_offsets, tokens);
    const Codes<uint8_t> seen("mask", mask, Number::BOOL, queries * tokens);
    check_out(out, queries * tokens);
    std::vector<float> step(queries);
    for (int64_t m = 0; m < queries; ++m) step[m] = given.data()[m] * float(scaling);
    float* to = static_cast<float*>(out.data);
    const Product task{a.data(), queries, width, k.data(), nullptr, nullptr, 1,
                       {step.data(), 1, steps.data(), nullptr, to, Type::FLOAT32, tokens}};
    const Table& isa = table();
    in_threads(tokens, grain(width),
               [&](int64_t begin, int64_t end) { isa.product(task, begin, end); });
    std::vector<int64_t> blind;
    for (int64_t m = 0; m < queries; ++m) {
        int32_t sum = 0;
        for (int64_t j = 0; j < width; ++j) sum += a.data()[m * width + j];
        const float shift = float(sum) * step[m];
        bool any = !seen.data();
        for (int64_t t = 0; t < tokens; ++t) {
            float& score = to[m * tokens + t];
            score += shift * shifts.data()[t];
            if (!seen.data()) continue;
            if (seen.data()[m * tokens + t]) any = true;
            else score = -__builtin_inff();
        }
        if (!any) blind.push_back(m);
    }
    return blind;
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
