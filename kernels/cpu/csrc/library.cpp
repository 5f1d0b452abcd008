// The operators as PyTorch knows them: one binary for all versions from 2.11, by the stable
// interface. The compiler's graphs and programs without Python reach them here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "operators.h"

namespace smoothq::registered {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t DEQUANTIZED_ROWS = 1024;  // of a weight that are in floats at one time

Number number_of(ScalarType type) {
    switch (type) {
        case ScalarType::Char: return Number::INT8;
        case ScalarType::Byte: return Number::UINT8;
        case ScalarType::Int: return Number::INT32;
        case ScalarType::Float: return Number::FLOAT32;
        case ScalarType::BFloat16: return Number::BFLOAT16;
        case ScalarType::Half: return Number::FLOAT16;
        case ScalarType::Double: return Number::FLOAT64;
        default: return Number::OTHER;
    }
}

View view_of(const Tensor& tensor) {
    View view;
    view.given = true;
    view.elsewhere = !tensor.is_cpu();
    view.data = view.elsewhere ? nullptr : tensor.data_ptr();
    view.number = number_of(tensor.scalar_type());
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    if (sizes.size() > MOST_AXES) throw std::invalid_argument("a tensor of more than 8 axes");
    view.axes = int(sizes.size());
    for (int axis = 0; axis < view.axes; ++axis) {
        view.sizes[axis] = sizes[axis];
        view.strides[axis] = strides[axis];
    }
    return view;
}

View view_of(const Maybe& tensor) { return tensor ? view_of(*tensor) : View{}; }

std::vector<int64_t> sizes_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return {sizes.begin(), sizes.end()};
}

// The first size of a matrix.
int64_t rows_of(const char* name, const Tensor& tensor) {
    if (tensor.dim() != 2) throw std::invalid_argument(std::string(name) + " is not a matrix");
    return tensor.size(0);
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::empty(sizes, type, std::nullopt, cpu);
}

// The dtype in which an output of a dtype is computed.
ScalarType computed(ScalarType type) {
    return type == ScalarType::BFloat16 ? type : ScalarType::Float;
}

Tensor in(ScalarType type, const Tensor& tensor) {
    return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// PyTorch's product of two matrices, `aten::NAME`.
Tensor product(const char* name, const Tensor& a, const Tensor& b) {
    std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor by_torch(const Tensor& codes, const Tensor& scale, const Tensor& weight,
                const Tensor& weight_scale, const Maybe& bias, ScalarType type) {
    const Tensor totals = product("aten::_int_mm", codes, torch::stable::transpose(weight, 0, 1));
    const Tensor out = empty(sizes_of(totals), computed(type));
    scaled(view_of(totals), view_of(scale), view_of(weight_scale), view_of(bias), view_of(out));
    return in(type, out);
}

Tensor int8_gemm(const Tensor& codes, const Tensor& scale, const Tensor& weight,
                 const Tensor& weight_scale, const Maybe& bias, ScalarType type) {
    const int64_t tokens = rows_of("codes", codes), rows = rows_of("weight", weight);
    // PyTorch misreads the strides of one column's transpose.
    if (torch_is_faster(tokens) && codes.size(1) > 1)
        return by_torch(codes, scale, weight, weight_scale, bias, type);
    const Tensor out = empty({tokens, rows}, computed(type));
    smoothq::int8_gemm(view_of(codes), view_of(scale), view_of(weight), view_of(weight_scale), view_of(bias),
              view_of(out));
    return in(type, out);
}

Tensor int4_gemm(const Tensor& codes, const Tensor& scale, const Tensor& packed,
                 const Tensor& weight_scale, const Maybe& multiplier, const Maybe& bias,
                 ScalarType type) {
    const int64_t tokens = rows_of("codes", codes), rows = rows_of("packed", packed);
    if (torch_is_faster(tokens) && codes.size(1) > 1) {
        const Tensor weight = empty({rows, codes.size(1)}, ScalarType::Char);
        unpack(view_of(packed), view_of(multiplier), view_of(weight));
        return by_torch(codes, scale, weight, weight_scale, bias, type);
    }
    const Tensor out = empty({tokens, rows}, computed(type));
    smoothq::int4_gemm(view_of(codes), view_of(scale), view_of(packed), view_of(weight_scale),
              view_of(multiplier), view_of(bias), view_of(out));
    return in(type, out);
}

Tensor weight_only_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                        const Maybe& multiplier, const Maybe& bias, int64_t bits) {
    const int64_t tokens = rows_of("x", x), rows = rows_of("packed", packed), width = x.size(1);
    const Tensor& scales = multiplier ? *multiplier : weight_scale;
    const int64_t groups = scales.dim() ? scales.size(scales.dim() - 1) : 1;
    const Tensor out = empty({tokens, rows}, ScalarType::Float);
    if (groups > 0 && reads_packed_floats(tokens, width, groups)) {
        smoothq::weight_only_gemm(view_of(x), view_of(packed), view_of(weight_scale), view_of(multiplier),
                         view_of(bias), bits, view_of(out));
        return in(x.scalar_type(), out);
    }
    const Tensor inputs = in(ScalarType::Float, x);
    for (int64_t row = 0; row < rows; row += DEQUANTIZED_ROWS) {
        const int64_t count = rows - row < DEQUANTIZED_ROWS ? rows - row : DEQUANTIZED_ROWS;
        const Tensor weight = empty({count, width}, ScalarType::Float);
        dequantize(view_of(packed), view_of(weight_scale), view_of(multiplier), bits, row,
                   view_of(weight));
        Tensor part = torch::stable::narrow(const_cast<Tensor&>(out), 1, row, count);
        torch::stable::copy_(
            part, product("aten::mm", inputs, torch::stable::transpose(weight, 0, 1)));
    }
    if (bias) add_bias(view_of(*bias), view_of(out));
    return in(x.scalar_type(), out);
}

std::tuple<Tensor, Tensor> cpu_quantize(const Tensor& x, int64_t mode, int64_t bits, double clip,
                                        int64_t group_size, const Maybe& multiplier,
                                        const Maybe& scale, const Maybe& signs, const Maybe& left,
                                        int64_t right) {
    std::vector<int64_t> sizes = sizes_of(x);
    const Tensor codes = empty(sizes, ScalarType::Char);
    if (!sizes.empty()) sizes.back() = 1;
    const Tensor scales = empty(sizes, ScalarType::Float);
    quantize(view_of(x),
             {mode_of(mode), bits, clip, group_size, view_of(multiplier), view_of(scale),
              view_of(signs), view_of(left), right},
             view_of(codes), view_of(scales));
    return {codes, scales};
}

Tensor cpu_hadamard(const Tensor& x, const Tensor& signs, const Tensor& left, int64_t right) {
    const Tensor out = empty(sizes_of(x), computed(x.scalar_type()));
    hadamard(view_of(x), view_of(signs), view_of(left), right, view_of(out));
    return in(x.scalar_type(), out);
}

}  // namespace
}  // namespace smoothq::registered

STABLE_TORCH_LIBRARY_FRAGMENT(smoothq, library) {
    library.def(
        "int8_gemm(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
        "ScalarType dtype) -> Tensor");
    library.def(
        "int4_gemm(Tensor codes, Tensor scale, Tensor packed, Tensor weight_scale, "
        "Tensor? multiplier, Tensor? bias, ScalarType dtype) -> Tensor");
    library.def(
        "weight_only_gemm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? multiplier, "
        "Tensor? bias, SymInt bits) -> Tensor");
    library.def(
        "cpu_quantize(Tensor x, int mode, int bits, float clip, int group_size, "
        "Tensor? multiplier, Tensor? scale, Tensor? signs, Tensor? left, int right) "
        "-> (Tensor, Tensor)");
    library.def("cpu_hadamard(Tensor x, Tensor signs, Tensor left, int right) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothq, CPU, library) {
    library.impl("int8_gemm", TORCH_BOX(&smoothq::registered::int8_gemm));
    library.impl("int4_gemm", TORCH_BOX(&smoothq::registered::int4_gemm));
    library.impl("weight_only_gemm", TORCH_BOX(&smoothq::registered::weight_only_gemm));
    library.impl("cpu_quantize", TORCH_BOX(&smoothq::registered::cpu_quantize));
    library.impl("cpu_hadamard", TORCH_BOX(&smoothq::registered::cpu_hadamard));
}
