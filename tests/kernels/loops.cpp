// Runs the CPU operators' loops on the tasks that stdin holds, and writes what they give to stdout:
// for processors that only an emulator has, where PyTorch does not run. SMOOTHQ_CPU_ISA chooses the
// instruction set; with an argument, the names of all that the processor has are written.
//
// A task is the number of its loop, then its operands in the order that `run` reads them, arrays
// after their numbers of elements.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isas.h"

using namespace smoothq;

namespace {

void read_into(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(2);
}

int64_t integer() {
    int64_t value;
    read_into(&value, sizeof value);
    return value;
}

float number() {
    float value;
    read_into(&value, sizeof value);
    return value;
}

template <class T>
struct Array {
    Array() : values(integer()) { read_into(values.data(), values.size() * sizeof(T)); }
    operator const T*() const { return values.empty() ? nullptr : values.data(); }
    std::vector<T> values;
};

template <class T>
void write(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

void run(int64_t loop) {
    const Table& isa = table();
    switch (loop) {
        case 0: {
            const int64_t tokens = integer(), width = integer();
            const Mode mode = Mode(integer());
            const int64_t bits = integer(), group = integer(), largest = integer();
            const float clip = number(), step = number();
            const Array<float> x;
            const Array<int8_t> multiplier;
            std::vector<int8_t> codes(tokens * width);
            std::vector<float> scales(tokens);
            isa.quantize({x, Type::FLOAT32, width, {},
                          {mode, int(bits), group, int(largest), clip, multiplier, step},
                          codes.data(), scales.data()},
                         0, tokens);
            write(codes);
            return write(scales);
        }
        case 1: {
            const int64_t tokens = integer(), width = integer(), order = integer(),
                          right = integer();
            const Array<float> x;
            const Array<int8_t> signs, left;
            std::vector<float> out(tokens * width);
            isa.rotate({x, Type::FLOAT32, width, {signs, left, order, right}, out.data()}, 0,
                       tokens);
            return write(out);
        }
        case 2: {
            const int64_t tokens = integer(), rows = integer(), width = integer(),
                          groups = integer();
            const Array<int8_t> codes, bytes;
            const Array<uint8_t> packed;
            const Array<int8_t> multiplier;
            const Array<float> token, row, bias;
            std::vector<float> out(tokens * rows);
            isa.product({codes, tokens, width, bytes, packed, multiplier, groups,
                         {token, 1, row, bias, out.data(), Type::FLOAT32, rows}},
                        0, rows);
            return write(out);
        }
        case 3: {
            const int64_t tokens = integer(), rows = integer();
            const Array<int32_t> totals;
            const Array<float> token, row, bias;
            std::vector<float> out(tokens * rows);
            isa.scale({totals, {token, 1, row, bias, out.data(), Type::FLOAT32, rows}}, 0, tokens);
            return write(out);
        }
        case 4: {
            const int64_t rows = integer(), width = integer(), groups = integer();
            const Array<uint8_t> packed;
            const Array<int8_t> multiplier;
            std::vector<int8_t> out(rows * width);
            isa.unpack({packed, multiplier, groups, width, out.data()}, 0, rows);
            return write(out);
        }
        case 7: {
            const int64_t rows = integer(), row_bytes = integer(), width = integer(),
                          group = integer(), bits = integer();
            const Array<uint8_t> cached;
            std::vector<float> out(rows * width);
            isa.expand({cached, row_bytes, width, group, int(bits), out.data()}, 0, rows);
            return write(out);
        }
        case 8: {
            const int64_t tokens = integer(), width = integer(), element = integer(),
                          scaling = integer(), group = integer();
            const float scale = number();
            const Array<float> x;
            std::vector<float> out(tokens * width);
            isa.fp_quantize({x, Type::FLOAT32, width, Element(element), FpScaling(scaling), group,
                             scale, out.data()},
                            0, tokens);
            return write(out);
        }
        default: {
            const bool product = loop == 5;
            const int64_t tokens = integer(), rows = integer(), width = integer(),
                          groups = integer(), bits = integer(), element = integer();
            const float tensor_scale = number();
            const Array<float> x;
            const Array<int8_t> bytes;
            const Array<uint8_t> packed;
            const Array<int32_t> words;
            const Array<float> scale;
            const Array<uint8_t> scale_bytes;
            const Array<int8_t> multiplier;
            const Type in_bytes = tensor_scale ? Type::E4M3 : Type::E8M0;
            const bool floats = scale_bytes.values.empty();
            const ScaledWeight weight{bytes,
                                      packed,
                                      floats ? static_cast<const void*>(scale.values.data())
                                             : scale_bytes.values.data(),
                                      floats ? Type::FLOAT32 : in_bytes,
                                      multiplier,
                                      groups,
                                      width,
                                      words,
                                      int(bits),
                                      Element(element),
                                      tensor_scale ? tensor_scale : 1.0f};
            std::vector<float> out((product ? tokens : width) * rows);
            if (product)
                isa.float_product({x, tokens, rows, weight, nullptr, out.data()}, 0, rows);
            else isa.dequantize({weight, 0, out.data()}, 0, rows);
            return write(out);
        }
    }
}

}  // namespace

int main(int count, char**) {
    if (count > 1) {
        for (const std::string& name : runnable()) std::printf("%s\n", name.c_str());
        return 0;
    }
    int64_t loop;
    while (std::fread(&loop, 1, sizeof loop, stdin) == sizeof loop) run(loop);
}
