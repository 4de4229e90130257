// A prototype: curves as polynomials on cells, looked up in shared memory; alpha's gradient is summed in registers.
//
//     nvcc -std=c++20 -O3 -arch=sm_90 bench/prototypes/cells.cu -o cells && ./cells
//
// measured.json has what an H100 said of each variant. Bytes of a float32 element: 8 forward, 12 backward; in that time
// an H100 issues 80 and 120 instructions. A lookup costs about 14 (cubic) to 26 (degree 7), whatever D and dictionary
// are; the 20 sums cost about 40.
#include "common.cuh"

__device__ __forceinline__ float exp2_approx(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}
__device__ __forceinline__ float reciprocal_approx(float v) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

// The cell of x, and v: the place in it, from −1 to 1.
template <int kCells> __device__ __forceinline__ int cell_of(float x, float& v) {
  constexpr float scale = kCells / (2 * kEnd), offset = kEnd * scale - 0.5;
  const float p = fminf(fmaxf(fmaf(x, scale, offset), -0.5f), kCells - 0.51f);
  const float rounded = p + 0x1.8p23f;  // whose last bits are the nearest cell's number
  v = 2 * (p - (rounded - 0x1.8p23f));
  return __float_as_int(rounded) - 0x4b400000;
}

// One copy of the table, [cell][4]: a lookup is one access of 16 bytes.
template <int kCells_> struct OneCopy {
  static constexpr int kDegree = 3, kCells = kCells_, kFloats = kCells * 4;
  static __device__ __forceinline__ float at(const float* table, float x) {
    float v;
    const float4 c = reinterpret_cast<const float4*>(table)[cell_of<kCells>(x, v)];
    return fmaf(fmaf(fmaf(c.w, v, c.z), v, c.y), v, c.x);
  }
  static __device__ __forceinline__ void fill(float* table, const float* tables, int channel, int) {
    for (int i = threadIdx.x; i < kFloats; i += blockDim.x) table[i] = tables[size_t(channel) * kFloats + i];
  }
};
// A copy for each lane in a bank of its own, [cell][coefficient][32]: no conflicts whatever the cells. In channels_last
// the lane's channel has the lane's copy (`stride` 1), else all copies are alike (0).
template <int kDegree_, int kCells_> struct Lanes {
  static constexpr int kDegree = kDegree_, kCells = kCells_, kSize = kCells * (kDegree + 1), kFloats = kSize * 32;
  static __device__ __forceinline__ float at(const float* table, float x) {
    float v;
    const float* c = table + cell_of<kCells>(x, v) * (kDegree + 1) * 32 + threadIdx.x % 32;
    float f = c[kDegree * 32];
#pragma unroll
    for (int j = kDegree - 1; j >= 0; --j) f = fmaf(f, v, c[j * 32]);
    return f;
  }
  static __device__ __forceinline__ void fill(float* table, const float* tables, int channel, int stride) {
    for (int i = threadIdx.x; i < kFloats; i += blockDim.x)
      table[i] = tables[size_t(channel + i % 32 * stride) * kSize + i / 32];
  }
};

// Σ g κ_k(x) for all points, in groups of five around an anchor: E r^j, with what does not depend on x left to `scale`.
struct Sums {
  float s[kPoints] = {};
  static constexpr float kLog2e = 1.44269504f, kT = kGamma * kStep * kStep;
  static __device__ constexpr float anchor(int group) { return 2 - 0.5f * (kPoints - 1) + 5 * group; }

  __device__ __forceinline__ void add(float x, float g) {
    constexpr float slope = 2 * kGamma * kStep * kLog2e;
    x = fminf(fmaxf(x, -float(kEnd)), float(kEnd));
    const float exponent = __fmul_rn(x, slope), lost = fmaf(x, slope, -exponent);
    float r = exp2_approx(exponent);
    r = fmaf(r * lost, 1 / kLog2e, r);
    const float q = reciprocal_approx(r), rr = r * r, qq = q * q;
#pragma unroll
    for (int group = 0; group < kPoints / 5; ++group) {
      const float e = fmaf(x, float(1 / kStep), -anchor(group)), w = g * exp2_approx(-kT * kLog2e * e * e);
      float* of_group = s + 5 * group;
      of_group[0] = fmaf(w, qq, of_group[0]), of_group[1] = fmaf(w, q, of_group[1]), of_group[2] += w;
      of_group[3] = fmaf(w, r, of_group[3]), of_group[4] = fmaf(w, rr, of_group[4]);
    }
  }
  static __device__ float scale(int k) {
    const int j = k % 5 - 2;
    return expf(-kT * (j * j + 2 * anchor(k / 5) * j));
  }
};

template <class T, class Table, int kThreads>
__global__ void __launch_bounds__(kThreads) forward(const uint4* x, uint4* y, const float* tables, const Runs runs) {
  extern __shared__ __align__(16) float table[];
  const Part part(runs);
  Table::fill(table, tables, part.channel, 0);
  __syncthreads();
  for (int v = threadIdx.x; v < part.count; v += kThreads) {
    const size_t at = part.at(runs, v);
    float f[kVector<T>];
    unpack<T>(__ldcs(x + at), f);
#pragma unroll
    for (float& e : f) e = Table::at(table, e);
    __stcs(y + at, pack<T>(f));
  }
}

template <class T, class Table, int kThreads, int kBlocks, bool kSums>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward(const uint4* x, const uint4* g, uint4* dx, const float* tables, float* partial, const Runs runs) {
  extern __shared__ __align__(16) float table[];
  const Part part(runs);
  Table::fill(table, tables, part.channel, 0);
  __syncthreads();
  Sums sums;
  for (int v = threadIdx.x; v < part.count; v += kThreads) {
    const size_t at = part.at(runs, v);
    float a[kVector<T>], b[kVector<T>], out[kVector<T>];
    unpack<T>(__ldcs(x + at), a), unpack<T>(__ldcs(g + at), b);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      out[e] = b[e] * Table::at(table, a[e]);
      if constexpr (kSums) sums.add(a[e], b[e]);
    }
    __stcs(dx + at, pack<T>(out));
  }
  if constexpr (kSums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      float s = sums.s[k];
      for (int offset = 16; offset; offset /= 2) s += __shfl_xor_sync(~0u, s, offset);
      if (lane == 0) table[warp * kPoints + k] = s;
    }
    __syncthreads();
    if (threadIdx.x >= kPoints) return;
    float s = 0;
    for (int w = 0; w < kThreads / 32; ++w) s += table[w * kPoints + threadIdx.x];
    partial[size_t(blockIdx.x) * kPoints + threadIdx.x] = s * Sums::scale(threadIdx.x);
  }
}

// channels_last [positions, channels]: a warp has 32 channels, and a block some positions; kDeep loads are under way.
__device__ __forceinline__ float load(const float* p) { return __ldcs(p); }
__device__ __forceinline__ float load(const bf16* p) {
  return __uint_as_float(uint32_t(__ldcs(reinterpret_cast<const unsigned short*>(p))) << 16);
}
__device__ __forceinline__ void store(float* p, float v) { __stcs(p, v); }
__device__ __forceinline__ void store(bf16* p, float v) {
  __stcs(reinterpret_cast<unsigned short*>(p), __bfloat16_as_ushort(__float2bfloat16_rn(v)));
}

template <class T, class Table, int kThreads, int kDeep>
__global__ void __launch_bounds__(kThreads)
    forward_last(const T* x, T* y, const float* tables, int channels, long positions, int per_block) {
  extern __shared__ __align__(16) float table[];
  constexpr int kWarps = kThreads / 32;
  const int groups = channels / 32, channel = blockIdx.x % groups * 32;
  const long start = long(blockIdx.x / groups) * per_block;
  const int count = min(long(per_block), positions - start);
  Table::fill(table, tables, channel, 1);
  __syncthreads();
  const size_t base = size_t(start) * channels + channel + threadIdx.x % 32;
  x += base, y += base;
  for (int p = threadIdx.x / 32; p < count; p += kWarps * kDeep) {
    float f[kDeep];
#pragma unroll
    for (int u = 0; u < kDeep; ++u) f[u] = p + u * kWarps < count ? load(x + (p + u * kWarps) * channels) : 0.0f;
#pragma unroll
    for (int u = 0; u < kDeep; ++u) f[u] = Table::at(table, f[u]);
#pragma unroll
    for (int u = 0; u < kDeep; ++u)
      if (p + u * kWarps < count) store(y + (p + u * kWarps) * channels, f[u]);
  }
}

template <class T, class Table, int kThreads, int kDeep>
__global__ void __launch_bounds__(kThreads, 1)
    backward_last(const T* x, const T* g, T* dx, const float* tables, float* partial, int channels, long positions,
                  int per_block) {
  extern __shared__ __align__(16) float table[];
  constexpr int kWarps = kThreads / 32;
  const int groups = channels / 32, channel = blockIdx.x % groups * 32;
  const long start = long(blockIdx.x / groups) * per_block;
  const int count = min(long(per_block), positions - start), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Table::fill(table, tables, channel, 1);
  __syncthreads();
  const size_t base = size_t(start) * channels + channel + lane;
  x += base, g += base, dx += base;
  Sums sums;
  for (int p = warp; p < count; p += kWarps * kDeep) {
    float a[kDeep], b[kDeep];
#pragma unroll
    for (int u = 0; u < kDeep; ++u) {
      const int q = p + u * kWarps;
      a[u] = q < count ? load(x + q * channels) : 0.0f;
      b[u] = q < count ? load(g + q * channels) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kDeep; ++u) {
      const int q = p + u * kWarps;
      sums.add(a[u], b[u]);
      if (q < count) store(dx + q * channels, b[u] * Table::at(table, a[u]));
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPoints; ++k) table[(warp * kPoints + k) * 32 + lane] = sums.s[k];
  __syncthreads();
  for (int i = threadIdx.x; i < kPoints * 32; i += kThreads) {
    float s = 0;
    for (int w = 0; w < kWarps; ++w) s += table[w * kPoints * 32 + i];
    partial[size_t(blockIdx.x) * kPoints * 32 + i] = s * Sums::scale(i / 32);
  }
}

// Tables [channel][cell][coefficient] of all curves, or their slopes: Chebyshev interpolation, as powers of v.
template <class Table> float* tables_of(const float* device_alpha, int channels, bool slope) {
  constexpr int K = Table::kDegree + 1;
  std::vector<float> alpha(channels * kPoints), out;
  CHECK(cudaMemcpy(alpha.data(), device_alpha, alpha.size() * 4, cudaMemcpyDeviceToHost));
  double power[K][K] = {{1}};  // T_i(v) = Σ_m power[i][m] v^m
  power[1][1] = 1;
  for (int i = 2; i < K; ++i)
    for (int m = 0; m < K; ++m) power[i][m] = (m ? 2 * power[i - 1][m - 1] : 0) - power[i - 2][m];
  for (int channel = 0; channel < channels; ++channel)
    for (int cell = 0; cell < Table::kCells; ++cell) {
      double f[K] = {}, c[K] = {};
      for (int i = 0; i < K; ++i)
        for (int k = 0; k < kPoints; ++k) {
          const double v = std::cos(M_PI * (i + 0.5) / K), x = (2 * cell + v + 1) * kEnd / Table::kCells - kEnd;
          const double d = x + kBoundary - k * kStep, e = alpha[channel * kPoints + k] * std::exp(-kGamma * d * d);
          f[i] += slope ? -2 * kGamma * d * e : e;
        }
      for (int j = 0; j < K; ++j) {
        double a = 0;
        for (int i = 0; i < K; ++i) a += f[i] * std::cos(M_PI * j * (i + 0.5) / K) * (j ? 2.0 : 1.0) / K;
        for (int m = 0; m < K; ++m) c[m] += a * power[j][m];
      }
      out.insert(out.end(), c, c + K);
    }
  float* device;
  CHECK(cudaMalloc(&device, out.size() * 4));
  CHECK(cudaMemcpy(device, out.data(), out.size() * 4, cudaMemcpyHostToDevice));
  return device;
}

template <class F> F with_memory(F kernel, size_t bytes) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  return kernel;
}

// Each variant with the launch that was the fastest on an H100: threads, blocks of an SM, rows a block.
template <class T, class Table, int kForward, int kBackward, int kBlocks>
void contiguous(const Problem<T>& p, const char* name, int rows, int backward_rows) {
  const float* values = tables_of<Table>(p.alpha, p.channels, false);
  const float* slopes = tables_of<Table>(p.alpha, p.channels, true);
  const size_t bytes = std::max<size_t>(Table::kFloats, kBackward / 32 * kPoints) * 4;
  const auto runs = [&](int per_block) { return Runs{p.rows, p.channels, p.inner / kVector<T>, per_block}; };
  const auto blocks = [&](int per_block) { return (p.rows + per_block - 1) / per_block * p.channels; };
  const auto *x = p.in(p.x), *g = p.in(p.g);
  auto* y = p.in(p.y);
  std::printf("%s\n", name);
  const auto f = with_memory(forward<T, Table, kForward>, bytes);
  p.time("forward", false, [&] { f<<<blocks(rows), kForward, bytes>>>(x, y, values, runs(rows)); });
  const auto dx = with_memory(backward<T, Table, 256, 2, false>, bytes);
  p.time("backward of x", true, [&] { dx<<<blocks(8), 256, bytes>>>(x, g, y, slopes, nullptr, runs(8)); });
  const auto both = with_memory(backward<T, Table, kBackward, kBlocks, true>, bytes);
  p.time("backward of x, alpha", true, [&] {
    both<<<blocks(backward_rows), kBackward, bytes>>>(x, g, y, slopes, p.partial, runs(backward_rows));
  });
  p.compare_sums(size_t(blocks(backward_rows)) * kPoints, [&](const std::vector<float>& partial, int k) {
    double sum = 0;
    for (int b = 0; b < blocks(backward_rows); b += p.channels) sum += partial[b * kPoints + k];
    return sum;
  });
}

template <class T, class Table> void channels_last(const Problem<T>& p, const char* name, int backward_positions) {
  const float* values = tables_of<Table>(p.alpha, p.channels, false);
  const float* slopes = tables_of<Table>(p.alpha, p.channels, true);
  const size_t bytes = std::max<size_t>(Table::kFloats, 16 * kPoints * 32) * 4;
  const auto blocks = [&](int per_block) { return (p.rows + per_block - 1) / per_block * (p.channels / 32); };
  std::printf("%s\n", name);
  const auto f = with_memory(forward_last<T, Table, 512, 8>, bytes);
  p.time("forward", false, [&] { f<<<blocks(4096), 512, bytes>>>(p.x, p.y, values, p.channels, p.rows, 4096); });
  const auto both = with_memory(backward_last<T, Table, 512, 4>, bytes);
  p.time("backward of x, alpha", true, [&] {
    both<<<blocks(backward_positions), 512, bytes>>>(p.x, p.g, p.y, slopes, p.partial, p.channels, p.rows,
                                                     backward_positions);
  });
  p.compare_sums(size_t(blocks(backward_positions)) * kPoints * 32, [&](const std::vector<float>& partial, int k) {
    double sum = 0;
    for (int b = 0; b < blocks(backward_positions); b += p.channels / 32) sum += partial[(b * kPoints + k) * 32];
    return sum;
  });
}

int main() {
  {
    const Problem<float> p(64, 256, 3136, size_t(1) << 22);
    contiguous<float, OneCopy<512>, 512, 256, 3>(p, "one copy, degree 3, 512 cells", 2, 4);
    contiguous<float, Lanes<7, 28>, 512, 256, 3>(p, "lanes, degree 7, 28 cells", 4, 16);
    contiguous<float, Lanes<5, 64>, 512, 256, 3>(p, "lanes, degree 5, 64 cells", 4, 16);
  }
  {
    const Problem<float> p(64 * 3136, 256, 1, size_t(1) << 22);
    channels_last<float, Lanes<7, 28>>(p, "channels_last, lanes, degree 7, 28 cells", 2048);
    channels_last<float, Lanes<5, 64>>(p, "channels_last, lanes, degree 5, 64 cells", 4096);
  }
  {
    const Problem<bf16> p(64, 256, 3136, size_t(1) << 22);
    contiguous<bf16, OneCopy<512>, 256, 256, 3>(p, "one copy, degree 3, 512 cells", 8, 16);
    contiguous<bf16, Lanes<7, 28>, 512, 128, 5>(p, "lanes, degree 7, 28 cells", 32, 8);
    contiguous<bf16, Lanes<5, 64>, 512, 256, 3>(p, "lanes, degree 5, 64 cells", 16, 16);
  }
  const Problem<bf16> p(64 * 3136, 256, 1, size_t(1) << 22);
  channels_last<bf16, Lanes<7, 28>>(p, "channels_last, lanes, degree 7, 28 cells", 4096);
  channels_last<bf16, Lanes<5, 64>>(p, "channels_last, lanes, degree 5, 64 cells", 4096);
}
