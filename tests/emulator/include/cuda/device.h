// The CPU in place of the GPU: see csrc/cuda/device.h, whose functions these are.
#pragma once
#include <cstdlib>
#include <cstring>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
// Full of NaN, so that what a kernel leaves unwritten shows.
inline torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                   torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype,
                                   const torch::stable::Tensor&) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  const torch::stable::Tensor made(handle);
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  if (bytes > 0) std::memset(made.data_ptr(), 0xff, static_cast<size_t>(bytes));
  return made;
}

inline Stream stream_of(const torch::stable::Tensor&) { return nullptr; }
inline size_t most_shared(const torch::stable::Tensor&, size_t) { return 227 << 10; }
// KAFOPS_EMULATOR_TABLES=1: whatever the count.
inline bool by_count(bool decision) { return std::getenv("KAFOPS_EMULATOR_TABLES") || decision; }
inline void check(int) {}

}  // namespace kaf
