// The GPU as the operators see it. tests/emulator puts a CPU in place of this file.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "call.h"

namespace kaf {

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

// Makes the device of a tensor the current one.
struct Guard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit Guard(const torch::stable::Tensor& x) : guard(x.get_device_index()) {}
};

// A new tensor, on the device of another. PyTorch's functions for it that are found by name cost as much as all else
// that the host does for a call.
inline torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                   torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype,
                                   const torch::stable::Tensor& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cuda(), like.get_device_index(),
                                                  &handle));
  return torch::stable::Tensor(handle);
}

inline Stream stream_of(const torch::stable::Tensor& x) {
  Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

// Bytes of shared memory that a block may have, asked only where `wanted` are more than any GPU has.
inline size_t most_shared(const torch::stable::Tensor& x, size_t wanted) {
  int bytes = 48 << 10;
  if (wanted <= static_cast<size_t>(bytes)) return bytes;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()));
  return bytes;
}

// What a count of operations and bytes says is done. The emulator overrules it, so that small tests come to tables.
inline bool by_count(bool decision) { return decision; }

// Raises what CUDA's error code stands for, if it is one.
inline void check(int code) { STD_CUDA_CHECK(static_cast<cudaError_t>(code)); }

}  // namespace kaf
