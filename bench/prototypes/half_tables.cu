// A prototype: a bfloat16 x has few values, so a table holds the answers to all, and alpha's gradient needs but one bin
// of g for each.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 bench/prototypes/half_tables.cu -o half_tables && ./half_tables
//
// measured.json has what an H100 said of each variant. Open: the bins' scale has to be known before, and equal inputs
// must not overflow them.
#include "common.cuh"

// |x| from 2^-16 to just below 8 as bits, everything else clamped; negative x in the second half.
constexpr uint32_t kFirst = (127 - 16) << 7, kLast = ((127 + 3) << 7) - 1, kNegative = 4096;
constexpr int kEntries = kNegative + kLast - kFirst + 1, kRows = 32;
static_assert(kLast - kFirst < kNegative);

__device__ float value_of(int entry) {
  const uint32_t bits = ((entry & (kNegative - 1)) + kFirst) | (entry >= kNegative ? 0x8000u : 0);
  return __uint_as_float(bits << 16);
}
// The entries of the two x in a word, side by side.
__device__ __forceinline__ uint32_t entries_of(uint32_t word) {
  const uint32_t magnitude = __vminu2(__vmaxu2(word & 0x7fff7fffu, kFirst * 0x10001u), kLast * 0x10001u);
  return (magnitude - kFirst * 0x10001u) | (word & 0x80008000u) >> 3;
}

__global__ void fill_kernel(const float* alpha, bf16* values, float* slopes) {
  const int channel = blockIdx.x;
  for (int i = threadIdx.x; i < kEntries; i += blockDim.x) {
    float f = 0, slope = 0;
    for (int k = 0; k < kPoints; ++k) {
      const float d = value_of(i) + float(kBoundary) - k * float(kStep);
      const float e = alpha[channel * kPoints + k] * expf(-float(kGamma) * d * d);
      f += e, slope = fmaf(-2 * float(kGamma) * d, e, slope);
    }
    values[channel * kEntries + i] = bf16(f), slopes[channel * kEntries + i] = slope;
  }
}

template <class V> __device__ __forceinline__ void fetch(uint4* to, const V* tables, int channel) {
  const auto* from = reinterpret_cast<const uint4*>(tables + size_t(channel) * kEntries);
  for (int i = threadIdx.x; i < int(kEntries * sizeof(V) / 16); i += blockDim.x) to[i] = from[i];
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) forward(const uint4* x, uint4* y, const uint16_t* tables, const Runs runs) {
  extern __shared__ uint4 memory[];
  const auto* table = reinterpret_cast<const uint16_t*>(memory);
  const Part part(runs);
  fetch(memory, tables, part.channel);
  __syncthreads();
  for (int v = threadIdx.x; v < part.count; v += kThreads) {
    const size_t at = part.at(runs, v);
    const uint4 w = __ldcs(x + at);
    uint32_t word[] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (uint32_t& e : word) {
      const uint32_t i = entries_of(e);
      e = table[i & 0xffff] | uint32_t(table[i >> 16]) << 16;
    }
    __stcs(y + at, uint4{word[0], word[1], word[2], word[3]});
  }
}

// dx, and with kBins g of each entry as an integer, g · scale, in a block's bins: exact, so in any order.
template <int kThreads, bool kBins>
__global__ void __launch_bounds__(kThreads) backward(const uint4* x, const uint4* g, uint4* dx, const float* tables,
                                                     float* partial, const Runs runs, float scale) {
  extern __shared__ uint4 memory[];
  const auto* table = reinterpret_cast<const float*>(memory);
  int* bins = reinterpret_cast<int*>(memory) + kEntries;
  const Part part(runs);
  fetch(memory, tables, part.channel);
  if constexpr (kBins)
    for (int i = threadIdx.x; i < kEntries; i += kThreads) bins[i] = 0;
  __syncthreads();
  for (int v = threadIdx.x; v < part.count; v += kThreads) {
    const size_t at = part.at(runs, v);
    const uint4 w = __ldcs(x + at);
    float b[8];
    unpack<bf16>(__ldcs(g + at), b);
    uint32_t word[] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t both = entries_of(word[e]);
      const int low = both & 0xffff, high = both >> 16;
      word[e] = pair(b[2 * e] * table[low], b[2 * e + 1] * table[high]);
      if constexpr (kBins) {
        atomicAdd(bins + low, __float2int_rn(b[2 * e] * scale));
        atomicAdd(bins + high, __float2int_rn(b[2 * e + 1] * scale));
      }
    }
    __stcs(dx + at, uint4{word[0], word[1], word[2], word[3]});
  }
  if constexpr (kBins) {
    __syncthreads();
    for (int i = threadIdx.x; i < kEntries; i += kThreads)
      partial[size_t(blockIdx.x) * kEntries + i] = bins[i] * (1 / scale);
  }
}

// From bins to gradients: Σ_bins bin κ_k(its value). A block for each channel.
__global__ void gradients_kernel(const float* partial, int channels, int chunks, float* gradients) {
  __shared__ float of_warp[32][kPoints];
  float sums[kPoints] = {};
  for (int i = threadIdx.x; i < kEntries; i += blockDim.x) {
    float bin = 0;
    for (int b = 0; b < chunks; ++b) bin += partial[(size_t(b) * channels + blockIdx.x) * kEntries + i];
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      const float d = value_of(i) + float(kBoundary) - k * float(kStep);
      sums[k] = fmaf(bin, exp2f(-float(kGamma) * 1.44269504f * d * d), sums[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kPoints; ++k) {
    for (int offset = 16; offset; offset /= 2) sums[k] += __shfl_xor_sync(~0u, sums[k], offset);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][k] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x >= kPoints) return;
  float sum = 0;
  for (int w = 0; w < int(blockDim.x / 32); ++w) sum += of_warp[w][threadIdx.x];
  gradients[blockIdx.x * kPoints + threadIdx.x] = sum;
}

int main() {
  constexpr size_t kPartials = size_t(64 / kRows * 256) * kEntries;
  const Problem<bf16> p(64, 256, 3136, kPartials);
  bf16* values;
  float *slopes, *gradients;
  CHECK(cudaMalloc(&values, p.channels * kEntries * 2)), CHECK(cudaMalloc(&slopes, p.channels * kEntries * 4));
  CHECK(cudaMalloc(&gradients, p.channels * kPoints * 4));
  std::printf("tables %.1f us\n", microseconds([&] { fill_kernel<<<p.channels, 512>>>(p.alpha, values, slopes); }));
  const auto *x = p.in(p.x), *g = p.in(p.g);
  auto* y = p.in(p.y);
  const auto runs = [&](int per_block) { return Runs{p.rows, p.channels, p.inner / 8, per_block}; };
  const auto blocks = [&](int per_block) { return p.rows / per_block * p.channels; };
  const auto* table = reinterpret_cast<const uint16_t*>(values);
  p.time("forward", false, [&] { forward<256><<<blocks(4), 256, kEntries * 2>>>(x, y, table, runs(4)); });
  p.time("backward of x", true, [&] {
    backward<512, false><<<blocks(4), 512, kEntries * 4>>>(x, g, y, slopes, nullptr, runs(4), 1);
  });
  const auto binned = backward<256, true>;
  CHECK(cudaFuncSetAttribute(binned, cudaFuncAttributeMaxDynamicSharedMemorySize, kEntries * 8));
  p.time("backward of x, integer bins", true, [&] {
    binned<<<blocks(kRows), 256, kEntries * 8>>>(x, g, y, slopes, p.partial, runs(kRows), 65536);
  });
  std::printf("bins to gradients %.1f us\n", microseconds([&] {
    gradients_kernel<<<p.channels, 512>>>(p.partial, p.channels, p.rows / kRows, gradients);
  }));
  CHECK(cudaMemcpy(p.partial, gradients, kPoints * 4, cudaMemcpyDeviceToDevice));
  p.compare_sums(kPoints, [](const std::vector<float>& got, int k) { return got[k]; });
}
