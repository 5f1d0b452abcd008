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
constexpr int64_t QUERY_ROWS = 512;  // whose scores int8_attention has at one time

Number number_of(ScalarType type) {
    switch (type) {
        case ScalarType::Char: return Number::INT8;
        case ScalarType::Byte: return Number::UINT8;
        case ScalarType::Int: return Number::INT32;
        case ScalarType::Long: return Number::INT64;
        case ScalarType::Bool: return Number::BOOL;
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

// PyTorch's operator `aten::NAME`, called with all its arguments.
template <class... Arguments>
Tensor aten(const char* name, const char* overload, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor by_torch(const Tensor& codes, const Tensor& scale, const Tensor& weight,
                const Tensor& weight_scale, const Maybe& bias, ScalarType type) {
    const Tensor totals = aten("aten::_int_mm", "", codes, torch::stable::transpose(weight, 0, 1));
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
    smoothq::int8_gemm(view_of(codes), view_of(scale), view_of(weight), view_of(weight_scale),
                       view_of(bias), view_of(out));
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

// The tensor of one expert, or none where there are none.
Maybe of(const std::vector<Tensor>& tensors, size_t expert) {
    return expert < tensors.size() ? Maybe(tensors[expert]) : std::nullopt;
}

std::vector<Expert> experts_of(const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& scales,
                               const std::vector<Tensor>& multipliers,
                               const std::vector<Tensor>& biases) {
    if (weights.empty()) throw std::invalid_argument("an operator of experts without weights");
    std::vector<Expert> experts;
    for (size_t i = 0; i < weights.size(); ++i)
        experts.push_back({view_of(weights[i]), view_of(of(scales, i)), view_of(of(multipliers, i)),
                           view_of(of(biases, i))});
    return experts;
}

// Experts with many tokens are left to PyTorch's own product.
Tensor expert_gemm(const Tensor& codes, const Tensor& scale, const Tensor& ends,
                   std::vector<Tensor> weights, std::vector<Tensor> weight_scales,
                   std::vector<Tensor> multipliers, std::vector<Tensor> biases, ScalarType type) {
    const std::vector<Expert> experts = experts_of(weights, weight_scales, multipliers, biases);
    const int64_t tokens = rows_of("codes", codes), rows = rows_of("weights", weights[0]);
    const std::vector<int64_t> counts = rows_of_experts(view_of(ends), tokens);
    const Tensor out = empty({tokens, rows}, computed(type));
    const int64_t most = codes.size(1) > 1 ? most_tokens() : INT64_MAX;
    smoothq::expert_gemm(view_of(codes), view_of(scale), counts, experts, most, view_of(out));
    for (int64_t i = 0, first = 0; i < int64_t(counts.size()); first += counts[i++]) {
        if (counts[i] <= most) continue;
        const auto part = [&](Tensor tensor) {
            return torch::stable::narrow(tensor, 0, first, counts[i]);
        };
        const Tensor steps = scale.size(0) == 1 ? scale : part(scale);
        const Tensor product =
            weights[i].scalar_type() == ScalarType::Byte
                ? int4_gemm(part(codes), steps, weights[i], weight_scales[i], of(multipliers, i),
                            of(biases, i), type)
                : int8_gemm(part(codes), steps, weights[i], weight_scales[i], of(biases, i), type);
        Tensor to = part(out);
        torch::stable::copy_(to, product);
    }
    return in(type, out);
}

// Floats by a weight of codes: few tokens meet the codes, many what they stand for.
Tensor by_codes(const Tensor& x, const CodedWeight& weight, const Maybe& bias) {
    const int64_t tokens = rows_of("x", x), rows = weight.packed.sizes[0], width = x.size(1);
    const int64_t groups = weight.groups();
    if (groups > 0 && !reads_packed_floats(tokens, width, groups) && has_tiles(width, groups)) {
        const Tensor out = empty({tokens, rows}, computed(x.scalar_type()));
        tile_product(view_of(x), weight, view_of(bias), view_of(out));
        return in(x.scalar_type(), out);
    }
    const Tensor out = empty({tokens, rows}, ScalarType::Float);
    if (groups > 0 && reads_packed_floats(tokens, width, groups)) {
        float_product(view_of(x), weight, view_of(bias), view_of(out));
        return in(x.scalar_type(), out);
    }
    const Tensor inputs = in(ScalarType::Float, x);
    for (int64_t row = 0; row < rows; row += DEQUANTIZED_ROWS) {
        const int64_t count = rows - row < DEQUANTIZED_ROWS ? rows - row : DEQUANTIZED_ROWS;
        const Tensor floats = empty({count, width}, ScalarType::Float);
        dequantize(weight, row, view_of(floats));
        Tensor part = torch::stable::narrow(const_cast<Tensor&>(out), 1, row, count);
        torch::stable::copy_(
            part, aten("aten::mm", "", inputs, torch::stable::transpose(floats, 0, 1)));
    }
    if (bias) finish({}, view_of(*bias), view_of(out));
    return in(x.scalar_type(), out);
}

Tensor weight_only_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                        const Maybe& multiplier, const Maybe& bias, int64_t bits) {
    rows_of("packed", packed);
    return by_codes(x, {view_of(packed), view_of(weight_scale), view_of(multiplier), {}, bits},
                    bias);
}

Tensor fp_gemm(const Tensor& x, const Tensor& packed, const Tensor& scale,
               const Maybe& tensor_scale, const Maybe& bias, const std::string& element) {
    rows_of("packed", packed);
    return by_codes(x, {view_of(packed), view_of(scale), {}, view_of(tensor_scale), 0,
                        element_of(element)}, bias);
}

// Experts whose packed codes are not read are left to `weight_only_gemm`.
Tensor expert_weight_only_gemm(const Tensor& x, const Tensor& ends, std::vector<Tensor> packed,
                               std::vector<Tensor> weight_scales, std::vector<Tensor> multipliers,
                               std::vector<Tensor> biases, int64_t bits) {
    const std::vector<Expert> experts = experts_of(packed, weight_scales, multipliers, biases);
    const int64_t tokens = rows_of("x", x), rows = rows_of("packed", packed[0]), width = x.size(1);
    const std::vector<int64_t> counts = rows_of_experts(view_of(ends), tokens);
    const Tensor inputs = in(ScalarType::Float, x), out = empty({tokens, rows}, ScalarType::Float);
    smoothq::expert_weight_only_gemm(view_of(inputs), counts, experts, bits, view_of(out));
    for (int64_t i = 0, first = 0; i < int64_t(counts.size()); first += counts[i++]) {
        if (!counts[i] || reads_packed_floats(counts[i], width, experts[i])) continue;
        const auto part = [&](Tensor tensor) {
            return torch::stable::narrow(tensor, 0, first, counts[i]);
        };
        Tensor to = part(out);
        torch::stable::copy_(to, weight_only_gemm(part(inputs), packed[i], weight_scales[i],
                                                  of(multipliers, i), of(biases, i), bits));
    }
    return in(x.scalar_type(), out);
}

// The blocks' scales, and the columns' order, go into the codes, which meet the weight as floats.
Tensor group_gemm(const Tensor& codes, const Tensor& scale, const Maybe& block_scale,
                  const Maybe& order, const Tensor& weight, const Tensor& weight_scale,
                  const Maybe& bias, int64_t group_size, ScalarType type) {
    const Tensor x = empty(sizes_of(codes), ScalarType::Float);
    place(view_of(codes), view_of(block_scale), view_of(order), group_size, view_of(x));
    const int64_t tokens = codes.size(0) * codes.size(1);
    const Tensor rows = torch::stable::view(x, {tokens, codes.size(2)});
    const Tensor products =
        weight_only_gemm(rows, weight, weight_scale, std::nullopt, std::nullopt, 8);
    finish(view_of(scale), view_of(bias), view_of(products));
    return in(type, torch::stable::view(products, {codes.size(0), codes.size(1), weight.size(0)}));
}

Tensor expanded(const Tensor& rows, int64_t bits, int64_t group_size, const Maybe& first,
                const Maybe& start) {
    std::vector<int64_t> sizes = sizes_of(rows);
    if (sizes.size() != 4) throw std::invalid_argument("rows of a cache have four axes");
    sizes[3] = row_width(view_of(rows), bits, group_size);
    const Tensor out = empty(sizes, ScalarType::Float);
    expand(view_of(rows), bits, group_size, view_of(first), view_of(start), view_of(out));
    return out;
}

Tensor cached_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                        const Maybe& first_keys, const Maybe& first_values, const Maybe& start,
                        const Maybe& mask, double scaling, int64_t bits,
                        std::optional<int64_t> group_size) {
    const int64_t group = group_size.value_or(0);
    const Tensor result = aten("aten::scaled_dot_product_attention", "",
                               in(ScalarType::Float, query),
                               expanded(keys, bits, group, first_keys, start),
                               expanded(values, bits, group, first_values, start), mask,
                               /*dropout_p=*/0.0, /*is_causal=*/false,
                               std::optional<double>(scaling), /*enable_gqa=*/true);
    return in(query.scalar_type(), result);
}

Tensor int8_attention(const Tensor& codes, const Tensor& scale, const Tensor& keys,
                      const Tensor& values, const Maybe& mask, double scaling, int64_t bits,
                      ScalarType type) {
    using torch::stable::narrow;
    using torch::stable::select;
    const int64_t batch = codes.size(0), queries = codes.size(1), length = codes.size(2);
    const int64_t heads = keys.size(1), tokens = keys.size(2);
    const Tensor floats = values.scalar_type() == ScalarType::Byte
                              ? expanded(values, bits, 0, std::nullopt, std::nullopt)
                              : in(ScalarType::Float, values);
    const Tensor out = empty({batch, queries, length, floats.size(3)}, ScalarType::Float);
    const Tensor key_codes = empty({tokens, codes.size(3)}, ScalarType::Char);
    const Tensor scales = empty({tokens}, ScalarType::Float);
    const Tensor offsets = empty({tokens}, ScalarType::Float);
    for (int64_t line = 0; line < batch * heads; ++line) {
        const int64_t b = line / heads, h = line % heads;
        const auto of = [&](const Tensor& tensor, int64_t head) {
            return select(select(tensor, 0, b), 0, head);
        };
        split(view_of(of(keys, h)), bits, view_of(key_codes), view_of(scales), view_of(offsets));
        for (int64_t q = h * queries / heads; q < (h + 1) * queries / heads; ++q)
            for (int64_t row = 0; row < length; row += QUERY_ROWS) {
                const int64_t count = length - row < QUERY_ROWS ? length - row : QUERY_ROWS;
                const auto some = [&](Tensor tensor) { return narrow(tensor, 0, row, count); };
                Maybe seen;
                if (mask) seen = some(select(select(*mask, 0, mask->size(0) > 1 ? b : 0), 0, 0));
                const Tensor score = empty({count, tokens}, ScalarType::Float);
                const std::vector<int64_t> blind =
                    scores(view_of(some(of(codes, q))), view_of(some(of(scale, q))),
                           view_of(key_codes), view_of(scales), view_of(offsets), view_of(seen),
                           scaling, view_of(score));
                const Tensor weights = aten("aten::_softmax", "", score, int64_t(-1), false);
                Tensor result = aten("aten::mm", "", weights, of(floats, h));
                for (const int64_t m : blind) {
                    Tensor none = select(result, 0, m);
                    torch::stable::zero_(none);
                }
                Tensor part = some(of(out, q));
                torch::stable::copy_(part, result);
            }
    }
    return in(type, out);
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

Tensor cpu_fp_quantize(const Tensor& x, int64_t element, int64_t scaling, int64_t group_size,
                       const Maybe& tensor_scale) {
    const Tensor out = empty(sizes_of(x), ScalarType::Float);
    fp_quantize(view_of(x), {element, scaling, group_size, view_of(tensor_scale)}, view_of(out));
    return out;
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
        "expert_gemm(Tensor codes, Tensor scale, Tensor ends, Tensor[] weights, "
        "Tensor[] weight_scales, Tensor[] multipliers, Tensor[] biases, ScalarType dtype) "
        "-> Tensor");
    library.def(
        "weight_only_gemm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? multiplier, "
        "Tensor? bias, SymInt bits) -> Tensor");
    library.def(
        "fp_gemm(Tensor x, Tensor packed, Tensor scale, Tensor? tensor_scale, Tensor? bias, "
        "str element) -> Tensor");
    library.def(
        "expert_weight_only_gemm(Tensor x, Tensor ends, Tensor[] packed, Tensor[] weight_scales, "
        "Tensor[] multipliers, Tensor[] biases, SymInt bits) -> Tensor");
    library.def(
        "group_gemm(Tensor codes, Tensor scale, Tensor? block_scale, Tensor? order, Tensor weight, "
        "Tensor weight_scale, Tensor? bias, SymInt group_size, ScalarType dtype) -> Tensor");
    library.def(
        "cached_attention(Tensor query, Tensor keys, Tensor values, Tensor? first_keys, "
        "Tensor? first_values, Tensor? start, Tensor? mask, float scaling, SymInt bits, "
        "SymInt? group_size) -> Tensor");
    library.def(
        "int8_attention(Tensor codes, Tensor scale, Tensor keys, Tensor values, Tensor? mask, "
        "float scaling, SymInt bits, ScalarType dtype) -> Tensor");
    library.def(
        "cpu_quantize(Tensor x, int mode, int bits, float clip, int group_size, "
        "Tensor? multiplier, Tensor? scale, Tensor? signs, Tensor? left, int right) "
        "-> (Tensor, Tensor)");
    library.def(
        "cpu_fp_quantize(Tensor x, int element, int scaling, int group_size, Tensor? tensor_scale) "
        "-> Tensor");
    library.def("cpu_hadamard(Tensor x, Tensor signs, Tensor left, int right) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothq, CPU, library) {
    library.impl("int8_gemm", TORCH_BOX(&smoothq::registered::int8_gemm));
    library.impl("int4_gemm", TORCH_BOX(&smoothq::registered::int4_gemm));
    library.impl("expert_gemm", TORCH_BOX(&smoothq::registered::expert_gemm));
    library.impl("weight_only_gemm", TORCH_BOX(&smoothq::registered::weight_only_gemm));
    library.impl("fp_gemm", TORCH_BOX(&smoothq::registered::fp_gemm));
    library.impl("expert_weight_only_gemm",
                 TORCH_BOX(&smoothq::registered::expert_weight_only_gemm));
    library.impl("group_gemm", TORCH_BOX(&smoothq::registered::group_gemm));
    library.impl("cached_attention", TORCH_BOX(&smoothq::registered::cached_attention));
    library.impl("int8_attention", TORCH_BOX(&smoothq::registered::int8_attention));
    library.impl("cpu_quantize", TORCH_BOX(&smoothq::registered::cpu_quantize));
    library.impl("cpu_fp_quantize", TORCH_BOX(&smoothq::registered::cpu_fp_quantize));
    library.impl("cpu_hadamard", TORCH_BOX(&smoothq::registered::cpu_hadamard));
}
