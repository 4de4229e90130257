// The CPU in place of the GPU: see csrc/cuda/device.h, whose functions these are.
#pragma once
#include <cstdlib>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../../../../csrc/cuda/call.h"

// What registers itself for CUDA tensors serves CPU tensors, in a library of its own.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(kafops_emulated, CPU, m, C10_UID)

namespace kaf {

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }
struct Guard {
  explicit Guard(const torch::stable::Tensor&) {}
};
inline Stream stream_of(const torch::stable::Tensor&) { return nullptr; }
inline size_t most_shared(const torch::stable::Tensor&) { return 227 << 10; }
// KAFOPS_EMULATOR_TABLES=1: whatever the count.
inline bool by_count(bool decision) { return std::getenv("KAFOPS_EMULATOR_TABLES") || decision; }
inline void check(int) {}

}  // namespace kaf
