// PyTorch's own threads: `torch.set_num_threads` counts, and there is no second pool.

#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>

namespace smoothq {

// Runs f(begin, end) over parts of [0, count), `grain` or more in each.
template <class F>
void in_threads(int64_t count, int64_t grain, const F& f) {
    if (count <= grain) return f(0, count);
    const auto part = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
    };
    if (torch_parallel_for(0, count, grain, part, const_cast<void*>(static_cast<const void*>(&f))))
        throw std::runtime_error("PyTorch could not run the threads");
}

}  // namespace smoothq
