// The operators as Python calls them outside of compilers: without PyTorch's dispatcher, which takes
// longer than a product of one token. Tensors come and go by DLPack's C exchange interface.
//
// A call answers None where it is not for this door: an operand that is not a plain tensor in the
// CPU's memory, or a number of tokens for which PyTorch's own product is faster. The registered
// operators (`library.cpp`) take every call.

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "isas.h"
#include "operators.h"

namespace smoothq {
namespace {

const DLPackExchangeAPI* exchange;
PyTypeObject *tensor_type, *parameter_type;
PyObject *float32, *bfloat16;

struct Failed {};    // a Python error is set
struct NotHere {};   // the call is not for this door

constexpr DLDataType INT8{kDLInt, 8, 1}, FLOAT32{kDLFloat, 32, 1}, BFLOAT16{kDLBfloat, 16, 1};

Number number_of(DLDataType type) {
    if (type.lanes != 1) return Number::OTHER;
    switch (type.code) {
        case kDLInt: return type.bits == 8    ? Number::INT8
                            : type.bits == 32 ? Number::INT32
                            : type.bits == 64 ? Number::INT64
                                              : Number::OTHER;
        case kDLUInt: return type.bits == 8 ? Number::UINT8 : Number::OTHER;
        case kDLBfloat: return Number::BFLOAT16;
        case kDLFloat: return type.bits == 32   ? Number::FLOAT32
                              : type.bits == 64 ? Number::FLOAT64
                              : type.bits == 16 ? Number::FLOAT16
                                                : Number::OTHER;
        default: return Number::OTHER;
    }
}

View view_of(PyObject* object) {
    View view;  // of None, as it is
    if (object == Py_None) return view;
    const PyTypeObject* type = Py_TYPE(object);
    if (type != tensor_type && type != parameter_type) throw NotHere();
    DLTensor tensor;
    view.given = true;
    if (exchange->dltensor_from_py_object_no_sync(object, &tensor)) {
        PyErr_Clear();  // DLPack has no name for the device, as for `meta`
        view.elsewhere = true;
        return view;
    }
    view.elsewhere = tensor.device.device_type != kDLCPU;
    if (tensor.ndim > MOST_AXES) throw std::invalid_argument("a tensor of more than 8 axes");
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.number = number_of(tensor.dtype);
    view.axes = tensor.ndim;
    int64_t stride = 1;
    for (int axis = view.axes - 1; axis >= 0; --axis) {
        view.sizes[axis] = tensor.shape[axis];
        view.strides[axis] = tensor.strides ? tensor.strides[axis] : stride;
        stride *= tensor.shape[axis];
    }
    return view;
}

// The operand that decides where a call runs.
View first(PyObject* object) {
    const View view = view_of(object);
    if (view.elsewhere) throw NotHere();
    return view;
}

// A new tensor of PyTorch's, and how the operators see it.
class Output {
public:
    Output(int axes, const int64_t* sizes, DLDataType type) {
        view.given = true;
        view.number = number_of(type);
        view.axes = axes;
        int64_t stride = 1;
        for (int axis = axes - 1; axis >= 0; --axis) {
            view.sizes[axis] = sizes[axis];
            view.strides[axis] = stride;
            stride *= sizes[axis];
        }
        DLTensor prototype{};
        prototype.ndim = axes;
        prototype.shape = view.sizes;
        prototype.dtype = type;
        prototype.device = {kDLCPU, 0};
        const auto fail = [](void*, const char*, const char* message) {
            PyErr_SetString(PyExc_RuntimeError, message);
        };
        if (exchange->managed_tensor_allocator(&prototype, &tensor_, nullptr, fail)) throw Failed();
        view.data = tensor_->dl_tensor.data;
    }

    ~Output() {
        if (tensor_ && tensor_->deleter) tensor_->deleter(tensor_);
    }
    Output(const Output&) = delete;

    // The tensor, a new reference; once.
    PyObject* object() {
        void* object;
        DLManagedTensorVersioned* tensor = tensor_;
        tensor_ = nullptr;
        if (exchange->managed_tensor_to_py_object_no_sync(tensor, &object)) throw Failed();
        return static_cast<PyObject*>(object);
    }

    View view;

private:
    DLManagedTensorVersioned* tensor_ = nullptr;
};

// Runs f without the interpreter's lock.
template <class F>
void unlocked(const F& f) {
    struct Unlocked {
        PyThreadState* state = PyEval_SaveThread();
        ~Unlocked() { PyEval_RestoreThread(state); }
    } now;
    f();
}

int64_t integer(PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw Failed();
    return value;
}

double number(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) throw Failed();
    return value;
}

// The first size of a matrix.
int64_t rows_of(const char* name, const View& view) {
    if (view.axes != 2) throw std::invalid_argument(std::string(name) + " is not a matrix");
    return view.sizes[0];
}

// A result that was computed in float32 or bfloat16, in the dtype that is asked for.
PyObject* in(PyObject* dtype, Output& out) {
    PyObject* result = out.object();
    if (dtype == float32 || dtype == bfloat16) return result;
    PyObject* converted = PyObject_CallMethod(result, "to", "O", dtype);
    Py_DecRef(result);
    if (!converted) throw Failed();
    return converted;
}

DLDataType computed(PyObject* dtype) { return dtype == bfloat16 ? BFLOAT16 : FLOAT32; }

using Arguments = PyObject* const*;

PyObject* int8_gemm(Arguments a) {
    const View codes = first(a[0]), scale = view_of(a[1]), weight = view_of(a[2]),
               weight_scale = view_of(a[3]), bias = view_of(a[4]);
    const int64_t sizes[] = {rows_of("codes", codes), rows_of("weight", weight)};
    if (torch_is_faster(sizes[0])) throw NotHere();
    Output out(2, sizes, computed(a[5]));
    unlocked([&] { int8_gemm(codes, scale, weight, weight_scale, bias, out.view); });
    return in(a[5], out);
}

PyObject* int4_gemm(Arguments a) {
    const View codes = first(a[0]), scale = view_of(a[1]), packed = view_of(a[2]),
               weight_scale = view_of(a[3]), multiplier = view_of(a[4]), bias = view_of(a[5]);
    const int64_t sizes[] = {rows_of("codes", codes), rows_of("packed", packed)};
    if (torch_is_faster(sizes[0])) throw NotHere();
    Output out(2, sizes, computed(a[6]));
    unlocked([&] { int4_gemm(codes, scale, packed, weight_scale, multiplier, bias, out.view); });
    return in(a[6], out);
}

// The tensor at a place of a list, or none where the list is shorter.
View member(PyObject* list, Py_ssize_t at) {
    if (!PyList_Check(list)) throw NotHere();
    return at < PyList_Size(list) ? view_of(PyList_GetItem(list, at)) : View{};
}

// The experts of lists of weights, scales, multipliers and biases.
std::vector<Expert> experts_of(Arguments a) {
    std::vector<Expert> experts;
    for (Py_ssize_t i = 0; !i || i < PyList_Size(a[0]); ++i)
        experts.push_back({member(a[0], i), member(a[1], i), member(a[2], i), member(a[3], i)});
    return experts;
}

PyObject* expert_gemm(Arguments a) {
    const View codes = first(a[0]), scale = view_of(a[1]), ends = view_of(a[2]);
    const std::vector<Expert> experts = experts_of(a + 3);
    const int64_t sizes[] = {rows_of("codes", codes), rows_of("weights", experts[0].weight)};
    const std::vector<int64_t> counts = rows_of_experts(ends, sizes[0]);
    for (const int64_t count : counts)
        if (torch_is_faster(count)) throw NotHere();
    Output out(2, sizes, computed(a[7]));
    unlocked([&] { expert_gemm(codes, scale, counts, experts, INT64_MAX, out.view); });
    return in(a[7], out);
}

// Floats by a weight of codes.
PyObject* by_codes(const View& x, const CodedWeight& weight, const View& bias) {
    const int64_t tokens = rows_of("x", x), rows = rows_of("packed", weight.packed);
    const int64_t groups = weight.groups();
    // Many tokens meet a float copy, by PyTorch's product; a result of 16 bits is converted there.
    if (x.number != Number::FLOAT32 || groups < 1 || !reads_packed_floats(tokens, x.last(), groups))
        throw NotHere();
    const int64_t sizes[] = {tokens, rows};
    Output out(2, sizes, FLOAT32);
    unlocked([&] { float_product(x, weight, bias, out.view); });
    return out.object();
}

PyObject* weight_only_gemm(Arguments a) {
    const View x = first(a[0]);
    return by_codes(x, {view_of(a[1]), view_of(a[2]), view_of(a[3]), {}, integer(a[5])},
                    view_of(a[4]));
}

PyObject* fp_gemm(Arguments a) {
    const View x = first(a[0]);
    const char* element = PyUnicode_AsUTF8AndSize(a[5], nullptr);
    if (!element) throw Failed();
    return by_codes(x, {view_of(a[1]), view_of(a[2]), {}, view_of(a[3]), 0, element_of(element)},
                    view_of(a[4]));
}

PyObject* fp_quantize(Arguments a) {
    const View x = first(a[0]);
    const FpQuantizing how(integer(a[1]), integer(a[2]), integer(a[3]), view_of(a[4]));
    Output out(x.axes, x.sizes, FLOAT32);
    unlocked([&] { fp_quantize(x, how, out.view); });
    return out.object();
}

PyObject* expert_weight_only_gemm(Arguments a) {
    const View x = first(a[0]), ends = view_of(a[1]);
    const std::vector<Expert> experts = experts_of(a + 2);
    const int64_t sizes[] = {rows_of("x", x), rows_of("packed", experts[0].weight)};
    const int64_t bits = integer(a[6]);
    const std::vector<int64_t> counts = rows_of_experts(ends, sizes[0]);
    if (x.number != Number::FLOAT32) throw NotHere();  // as `weight_only_gemm`
    for (size_t i = 0; i < counts.size() && i < experts.size(); ++i)
        if (counts[i] && !reads_packed_floats(counts[i], x.last(), experts[i])) throw NotHere();
    Output out(2, sizes, FLOAT32);
    unlocked([&] { expert_weight_only_gemm(x, counts, experts, bits, out.view); });
    return out.object();
}

PyObject* quantize(Arguments a) {
    const View x = first(a[0]);
    const Quantizing how{mode_of(integer(a[1])), integer(a[2]),  number(a[3]),
                         integer(a[4]),          view_of(a[5]),  view_of(a[6]),
                         view_of(a[7]),          view_of(a[8]),  integer(a[9])};
    Output codes(x.axes, x.sizes, INT8);
    int64_t sizes[MOST_AXES];
    for (int axis = 0; axis < x.axes; ++axis) sizes[axis] = axis + 1 < x.axes ? x.sizes[axis] : 1;
    Output scales(x.axes, sizes, FLOAT32);
    unlocked([&] { quantize(x, how, codes.view, scales.view); });
    PyObject *first = codes.object(), *pair = PyTuple_New(2);
    if (!pair) throw Failed();
    PyTuple_SetItem(pair, 0, first);
    PyTuple_SetItem(pair, 1, scales.object());
    return pair;
}

PyObject* hadamard(Arguments a) {
    const View x = first(a[0]), signs = view_of(a[1]), left = view_of(a[2]);
    const int64_t right = integer(a[3]);
    if (x.number != Number::FLOAT32 && x.number != Number::BFLOAT16) throw NotHere();
    Output out(x.axes, x.sizes, x.number == Number::BFLOAT16 ? BFLOAT16 : FLOAT32);
    unlocked([&] { hadamard(x, signs, left, right, out.view); });
    return out.object();
}

PyObject* unpack(Arguments a) {
    const View packed = first(a[0]), multiplier = view_of(a[2]);
    const int64_t sizes[] = {rows_of("packed", packed), integer(a[1])};
    if (sizes[1] < 0) throw std::invalid_argument("a negative number of columns");
    Output out(2, sizes, INT8);
    unlocked([&] { unpack(packed, multiplier, out.view); });
    return out.object();
}

template <PyObject* (*OPERATOR)(Arguments), Py_ssize_t COUNT>
PyObject* called(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != COUNT)
        return PyErr_Format(PyExc_TypeError, "%zd arguments are needed, %zd given", COUNT, count);
    try {
        return OPERATOR(arguments);
    } catch (const NotHere&) {
        Py_IncRef(Py_None);
        return Py_None;
    } catch (const Failed&) {
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// start(exchange API, Tensor, Parameter, float32, bfloat16): what of PyTorch the calls need.
PyObject* start(Arguments a) {
    exchange = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(a[0], "dlpack_exchange_api"));
    if (!exchange) throw Failed();
    for (int i = 1; i < 5; ++i) Py_IncRef(a[i]);
    tensor_type = reinterpret_cast<PyTypeObject*>(a[1]);
    parameter_type = reinterpret_cast<PyTypeObject*>(a[2]);
    float32 = a[3], bfloat16 = a[4];
    table();  // an instruction set that is not here is refused now
    Py_IncRef(Py_None);
    return Py_None;
}

PyObject* use_isa(Arguments a) {
    const char* name = PyUnicode_AsUTF8AndSize(a[0], nullptr);
    if (!name) throw Failed();
    use(name);
    Py_IncRef(Py_None);
    return Py_None;
}

PyObject* isas(Arguments) {
    const std::vector<std::string> names = runnable();
    PyObject* list = PyList_New(0);
    for (const std::string& name : names) {
        PyObject* text = PyUnicode_FromString(name.c_str());
        if (!list || !text || PyList_Append(list, text)) throw Failed();
        Py_DecRef(text);
    }
    return list;
}

PyObject* isa(Arguments) { return PyUnicode_FromString(table().name); }

template <PyObject* (*OPERATOR)(Arguments), Py_ssize_t COUNT>
constexpr PyMethodDef method(const char* name, const char* signature) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<OPERATOR, COUNT>)),
            METH_FASTCALL, signature};
}

PyMethodDef METHODS[] = {
    method<start, 5>("start", "start(exchange_api, Tensor, Parameter, float32, bfloat16)"),
    method<int8_gemm, 6>("int8_gemm", "int8_gemm(codes, scale, weight, weight_scale, bias, dtype)"),
    method<int4_gemm, 7>(
        "int4_gemm", "int4_gemm(codes, scale, packed, weight_scale, multiplier, bias, dtype)"),
    method<expert_gemm, 8>(
        "expert_gemm",
        "expert_gemm(codes, scale, ends, weights, weight_scales, multipliers, biases, dtype)"),
    method<weight_only_gemm, 6>(
        "weight_only_gemm", "weight_only_gemm(x, packed, weight_scale, multiplier, bias, bits)"),
    method<fp_gemm, 6>("fp_gemm", "fp_gemm(x, packed, scale, tensor_scale, bias, element)"),
    method<fp_quantize, 5>(
        "fp_quantize", "fp_quantize(x, element, scaling, group_size, tensor_scale)"),
    method<expert_weight_only_gemm, 7>(
        "expert_weight_only_gemm",
        "expert_weight_only_gemm(x, ends, packed, weight_scales, multipliers, biases, bits)"),
    method<quantize, 10>(
        "quantize",
        "quantize(x, mode, bits, clip, group_size, multiplier, scale, signs, left, right)"),
    method<hadamard, 4>("hadamard", "hadamard(x, signs, left, right)"),
    method<unpack, 3>("unpack", "unpack(packed, columns, multiplier)"),
    method<isa, 0>("isa", "The name of the instruction set that runs."),
    method<isas, 0>("isas", "Names of all instruction sets of this processor, the best first."),
    method<use_isa, 1>("use_isa", "use_isa(name): run another instruction set from now on."),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE{PyModuleDef_HEAD_INIT, "_operators", "The CPU operators, compiled.", -1, METHODS,
                   nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace smoothq

PyMODINIT_FUNC PyInit__operators() { return PyModule_Create(&smoothq::MODULE); }
