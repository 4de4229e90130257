// The GPU as the kernels see it: what only its own compiler knows. tests/emulator puts a CPU in place of this file.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <utility>

#include "call.h"

#define KAF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace kaf {

// Half precision, as bits.
__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }
__device__ __forceinline__ uint16_t float_to_bfloat16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }

// 2^v, relative error 2^-22; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// 1 / v within 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// Has a kernel get more shared memory than 48 KB on the current device, where it was not given as much before.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (!error) most = bytes;
  return error;
}

// Starts a kernel, and returns CUDA's error code.
template <class Kernel, class Argument>
int launch(Kernel kernel, dim3 grid, int threads, size_t shared, Stream stream, const Argument& argument) {
  if (shared > 48 << 10)
    if (const auto error = allow_shared(reinterpret_cast<const void*>(kernel), shared)) return error;
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(argument);
  return cudaGetLastError();
}

}  // namespace kaf
