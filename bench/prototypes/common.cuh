// What the prototypes share: the problem, 16-byte accesses, a timer, and errors against float64.
#pragma once
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using bf16 = __nv_bfloat16;

constexpr int kPoints = 20;  // D, even on [−3, 3], with the usual bandwidth
constexpr double kBoundary = 3, kStep = 2 * kBoundary / (kPoints - 1), kGamma = 1 / (6 * kStep * kStep);
constexpr double kEnd = kBoundary + 3.4;  // beyond ±kEnd a kernel is below 2^-27

inline void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

// 16 bytes of memory as numbers, and back.
template <class T> constexpr int kVector = 16 / sizeof(T);
template <class T> __device__ __forceinline__ void unpack(const uint4& w, float (&v)[kVector<T>]) {
  const uint32_t word[] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4) v[i] = __uint_as_float(word[i]);
    else v[2 * i] = __uint_as_float(word[i] << 16), v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
}
__device__ __forceinline__ uint32_t pair(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <class T> __device__ __forceinline__ uint4 pack(const float (&v)[kVector<T>]) {
  if constexpr (sizeof(T) == 4)
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
  else return {pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7])};
}

// Contiguous tensors [rows, channels, vectors of 16 bytes]; a block has one channel of some rows.
struct Runs {
  int rows, channels, vectors, rows_per_block;
};
struct Part {
  int channel, row, count;  // count: vectors of this block
  __device__ __forceinline__ explicit Part(const Runs& r)
      : channel(blockIdx.x % r.channels), row(blockIdx.x / r.channels * r.rows_per_block),
        count(min(r.rows_per_block, r.rows - row) * r.vectors) {}
  __device__ __forceinline__ size_t at(const Runs& r, int v) const {
    const int in_block = v / r.vectors;
    return (size_t(row + in_block) * r.channels + channel) * r.vectors + (v - in_block * r.vectors);
  }
};

__global__ void copy_kernel(const uint4* x, uint4* y, size_t n) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    __stcs(y + i, __ldcs(x + i));
}
__global__ void combine_kernel(const uint4* x, const uint4* g, uint4* y, size_t n) {  // backward's traffic
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    const uint4 a = __ldcs(x + i), b = __ldcs(g + i);
    __stcs(y + i, uint4{a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w});
  }
}

// Normal numbers from a hash of their place.
template <class T> __global__ void normal_kernel(T* x, size_t n, float deviation, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint64_t h = (i + seed) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u, h ^= h >> 32;
    const float u = (uint32_t(h) + 0.5f) * 0x1p-32f, angle = uint32_t(h >> 32) * 0x1p-31f;
    x[i] = T(deviation * sqrtf(-2 * logf(u)) * cospif(angle));
  }
}

// The largest |y − f(x)|, or with g |y − g f′(x)|, less y's own rounding, as a share of Σ|α| (of |g| + 1).
template <class T>
__global__ void error_kernel(const T* x, const T* g, const T* y, const float* alpha, size_t n, int channels, int inner,
                             float* worst) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    const float* a = alpha + i / inner % channels * kPoints;
    double f = 0, scale = 0;
    for (int k = 0; k < kPoints; ++k) {
      const double d = double(float(x[i])) + kBoundary - k * kStep, e = a[k] * exp(-kGamma * d * d);
      f += g ? -2 * kGamma * d * e * double(float(g[i])) : e, scale += fabs(a[k]);
    }
    const double error = fabs(double(float(y[i])) - f) - (sizeof(T) == 2 ? fabs(f) * 0x1p-8 : 0);
    if (g) scale *= fabs(double(float(g[i]))) + 1;
    if (error > 0) atomicMax(reinterpret_cast<int*>(worst), __float_as_int(float(error / scale)));
  }
}
// Of one channel: Σ_n g_n κ_k(x_n), and the same of absolute values. A block for each point.
template <class T>
__global__ void sums_kernel(const T* x, const T* g, size_t n, int channels, int inner, int channel, double* sums) {
  double sum = 0, absolute = 0;
  for (size_t i = threadIdx.x; i < n / channels; i += blockDim.x) {
    const size_t at = (i / inner * channels + channel) * inner + i % inner;
    const double d = double(float(x[at])) + kBoundary - blockIdx.x * kStep, e = float(g[at]) * exp(-kGamma * d * d);
    sum += e, absolute += fabs(e);
  }
  atomicAdd(sums + 2 * blockIdx.x, sum), atomicAdd(sums + 2 * blockIdx.x + 1, absolute);
}

template <class F> float microseconds(F call) {  // the median of 15
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start)), CHECK(cudaEventCreate(&end));
  std::vector<float> taken(17);
  for (float& t : taken) {
    CHECK(cudaEventRecord(start)), call(), CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end)), CHECK(cudaEventElapsedTime(&t, start, end));
  }
  CHECK(cudaGetLastError());
  std::sort(taken.begin() + 2, taken.end());
  return taken[9] * 1e3f;
}

template <class T> struct Problem {
  int rows, channels, inner;  // [rows, channels, inner], or channels_last where inner = 1
  size_t n = size_t(rows) * channels * inner;
  T *x, *g, *y;
  float *alpha, *partial, copy_us, combine_us;  // partial: what a block leaves of its sums

  Problem(int rows_, int channels_, int inner_, size_t partials) : rows(rows_), channels(channels_), inner(inner_) {
    for (T** t : {&x, &g, &y}) CHECK(cudaMalloc(t, n * sizeof(T)));
    CHECK(cudaMalloc(&alpha, channels * kPoints * 4)), CHECK(cudaMalloc(&partial, partials * 4));
    normal_kernel<<<1024, 256>>>(x, n, 1, 1), normal_kernel<<<1024, 256>>>(g, n, 1, 2 * n);
    normal_kernel<<<64, 256>>>(alpha, size_t(channels) * kPoints, 0.8f, 4 * n);
    const size_t vectors = n / kVector<T>;
    copy_us = microseconds([&] { copy_kernel<<<1056, 512>>>(in(x), in(y), vectors); });
    combine_us = microseconds([&] { combine_kernel<<<1056, 512>>>(in(x), in(g), in(y), vectors); });
    std::printf("(%d, %d, %d) %s: copy %.1f us, of three tensors %.1f us\n", rows, channels, inner,
                sizeof(T) == 4 ? "float32" : "bfloat16", copy_us, combine_us);
  }
  ~Problem() {
    for (void* t : {(void*)x, (void*)g, (void*)y, (void*)alpha, (void*)partial}) cudaFree(t);
  }
  static uint4* in(T* t) { return reinterpret_cast<uint4*>(t); }

  // Times a call that writes y: its share of the copy, and its largest error.
  template <class F> void time(const char* name, bool backward, F call) const {
    const float us = microseconds(call);
    float error = 0, *worst;
    CHECK(cudaMalloc(&worst, 4)), CHECK(cudaMemset(worst, 0, 4));
    error_kernel<<<1056, 256>>>(x, backward ? g : nullptr, y, alpha, n, channels, inner, worst);
    CHECK(cudaMemcpy(&error, worst, 4, cudaMemcpyDeviceToHost)), cudaFree(worst);
    const float share = (backward ? combine_us : copy_us) / us;
    std::printf("  %-30s %7.1f us, %.2f of a copy, error %.1e\n", name, us, share, error);
  }
  // Compares the sums of channel 0: `of(k)` picks them from what is in `partial`.
  template <class F> void compare_sums(size_t partials, F of) const {
    std::vector<float> got(partials);
    std::vector<double> want(2 * kPoints);
    double *sums, worst = 0;
    CHECK(cudaMalloc(&sums, 16 * kPoints)), CHECK(cudaMemset(sums, 0, 16 * kPoints));
    sums_kernel<<<kPoints, 512>>>(x, g, n, channels, inner, 0, sums);
    CHECK(cudaMemcpy(want.data(), sums, 16 * kPoints, cudaMemcpyDeviceToHost)), cudaFree(sums);
    CHECK(cudaMemcpy(got.data(), partial, partials * 4, cudaMemcpyDeviceToHost));
    for (int k = 0; k < kPoints; ++k) worst = std::max(worst, std::fabs(of(got, k) - want[2 * k]) / want[2 * k + 1]);
    std::printf("  %-30s error %.1e of the terms\n", "  its sums", worst);
  }
};
