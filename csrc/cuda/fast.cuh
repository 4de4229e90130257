// The fast path: a uniform dictionary in float32, at two exponentials and five more for twenty points.
//
// Points are taken in groups of five around an anchor. With e = (x − anchor) / Δ, t = γΔ², r = exp(2γΔx), s = 1 / r, x
// measured from the middle of the dictionary, and anchors a in steps of Δ from there,
//
//     exp(−γ (x − δ)²) = E r^j e^(−t j² − 2 t a j),    E = exp(−t e²),    j = −2 … 2 the point's place in its group
//
//     f    = Σ_groups E P(r),            P = c0 + r (c1 + r c2) + s (c−1 + s c−2),     c_j = α e^(−t j² − 2 t a j)
//     f′   = −2t/Δ Σ_groups E (e P − Q),  Q = r (c1 + 2 r c2) − s (c−1 + 2 s c−2)
//     ∂α_j = e^(−t j² − 2 t a j) Σ_n g E r^j
//
// so an element costs one exponential for each group, one for r and a reciprocal. x is clamped to where every E is 0, and
// the path is taken where no power can overflow before that: see fits.
//
// Napkin: float32, D = 20, forward moves 8 bytes an element, backward 12. An H100 moves 3.35 TB/s with 132 × 4 × 32 lanes
// at 1.98 GHz, so 80 and 120 instructions an element fit into the time that memory takes, and 10 and 15 exponentials.
// Counted by hand: clamp 2, r and s 7, a group 10 forward (e 2, E 3, P 4, sum 1) and 23 backward (and Q 4, e P − Q 1, sums
// 8), so 49 and 101. docs/gpu-static.md counts the machine code.
#pragma once
#include "tiles.cuh"

namespace kaf {

constexpr float kGroupReach = 9.4868f;  // exp(−reach²) is below the smallest float32

// What all points of one channel share.
struct Scales {
  float high, low;              // c · x ≈ high · x + low · x, for 1 / Δ
  float kappa_high, kappa_low;  // the same for 2γΔ log2 e
  float exponent;               // −t log2 e
  float x_low, x_high;          // x is clamped to these
};

// Of one chunk of points, in shared memory: coefficients by group (c0 c1 c2 c−1 c−2), then 2 c2 and 2 c−2 by group.
constexpr int kChunkFloats = 7 * kGroups;

// a (high + low) to nearly twice the precision.
KAF_FN Split<float> times(float a, Split<float> b) {
  const float high = a * b.high;
  return {high, fmaf(a, b.low, fmaf(a, b.high, -high))};
}

// Whether no power overflows: the largest is α e^(2 j t (e − a)) with |j| = 2, |e − a| up to the dictionary and its tails.
// False for NaN.
__device__ __forceinline__ bool fits(const Uniform& u, int size, float gamma, float alpha) {
  const float log2e = 1.44269504f, t = gamma * u.step * u.step;
  if (!(t >= 1.0f / 1024 && t <= 4)) return false;
  return fabsf(alpha) <= exp2_approx(120 - 4 * log2e * t * (size + 4 + kGroupReach / sqrtf(t)));
}

__device__ __forceinline__ Scales scales_of(const Uniform& u, float gamma) {
  const Split<float> kappa = times(gamma, u.kappa_by_gamma), t = times(gamma, u.t_by_gamma);
  const float reach = kGroupReach / sqrtf(gamma * u.step * u.step);
  return {u.inverse_step.high, u.inverse_step.low, kappa.high, kappa.low, -t.high, (u.first_anchor - reach) * u.step,
          (u.last_anchor + reach) * u.step};
}

// e^(−t j² − 2 t a j) of point k, with j and a those of its group.
__device__ __forceinline__ float point_scale(const Uniform& u, float gamma, int k) {
  const int j = k % kGroup - 2;
  const float a = u.first_anchor + kGroup * (k / kGroup), n = -j * (j + 2 * a);  // n is exact
  const Split<float> t = times(gamma, u.t_by_gamma), z = times(n, t);
  return exp2_exact(z.high, z.low);
}

// r = 2^(κ x) to a rounding or two: the product's own rounding error comes back as a factor.
struct Powers {
  float r, s;
};
__device__ __forceinline__ Powers powers(float x, const Scales& c) {
  const float p = __fmul_rn(x, c.kappa_high);
  const float error = fmaf(x, c.kappa_low, fmaf(x, c.kappa_high, -p));
  float r = exp2_approx(p);
  r = fmaf(r * error, 0.69314718f, r);
  return {r, reciprocal_approx(r)};
}

struct Coefficients {
  float c[kChunkFloats];

  __device__ __forceinline__ explicit Coefficients(const float* shared) {
#pragma unroll
    for (int i = 0; i < kChunkFloats; i += 4) *reinterpret_cast<Vector16<float>*>(c + i) = *reinterpret_cast<const Vector16<float>*>(shared + i);
  }
  // Of group q: c_j, and 2 c_j for j = ±2.
  __device__ __forceinline__ float operator()(int q, int j) const { return c[kGroup * q + (j < 0 ? 2 - j : j)]; }
  __device__ __forceinline__ float twice(int q, int j) const { return c[kPoints + 2 * q + (j < 0)]; }
};

struct GroupPlace {
  float e, gaussian;  // (x − anchor) / Δ, E
};
__device__ __forceinline__ GroupPlace place(float x, float anchor, const Scales& c) {
  const float e = fmaf(x, c.low, fmaf(x, c.high, -anchor));
  return {e, exp2_approx(c.exponent * e * e)};
}

// Σ E P over a chunk of groups whose first anchor is given, added to y.
__device__ __forceinline__ float add_values(float y, float x, Powers p, float anchor, const Scales& s, const Coefficients& c) {
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    const GroupPlace at = place(x, anchor + kGroup * q, s);
    const float right = fmaf(p.r, fmaf(p.r, c(q, 2), c(q, 1)), c(q, 0));
    y = fmaf(at.gaussian, fmaf(p.s, fmaf(p.s, c(q, -2), c(q, -1)), right), y);
  }
  return y;
}

// Σ E (e P − Q) over a chunk, added to slope; and, with kSums, g E r^j to sums.
template <bool kSums>
__device__ __forceinline__ float add_slopes(float slope, float x, float g, Powers p, float anchor, const Scales& s,
                                            const Coefficients& c, float (&sums)[kPoints]) {
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    const GroupPlace at = place(x, anchor + kGroup * q, s);
    const float right = fmaf(p.r, fmaf(p.r, c(q, 2), c(q, 1)), c(q, 0));
    const float value = fmaf(p.s, fmaf(p.s, c(q, -2), c(q, -1)), right);
    const float up = p.r * fmaf(p.r, c.twice(q, 2), c(q, 1)), down = fmaf(p.s, c.twice(q, -2), c(q, -1));
    slope = fmaf(at.gaussian, fmaf(p.s, down, fmaf(at.e, value, -up)), slope);
    if constexpr (kSums) {
      const float w = g * at.gaussian, above = w * p.r, below = w * p.s;
      float* of_group = sums + kGroup * q;  // j = −2 … 2
      of_group[0] = fmaf(below, p.s, of_group[0]);
      of_group[1] += below;
      of_group[2] += w;
      of_group[3] += above;
      of_group[4] = fmaf(above, p.r, of_group[4]);
    }
  }
  return slope;
}

// The shared memory of a block: coefficients [columns_at_once][chunks][kChunkFloats], scales of the points of one chunk
// [kPoints][columns_at_once], and behind them sums [kPoints][kThreads].
struct FastShared {
  float *coefficients, *point_scales, *sums;
  KAF_FN FastShared(unsigned char* memory, int columns, int chunks) {
    coefficients = reinterpret_cast<float*>(memory);
    point_scales = coefficients + columns * chunks * kChunkFloats;
    sums = point_scales + kPoints * columns;
  }
  KAF_FN static size_t bytes(int columns, int chunks, bool sums) {
    return sizeof(float) * (columns * chunks * kChunkFloats + kPoints * columns + (sums ? kPoints * kThreads : 0));
  }
};

// Fills shared memory for the columns that are active, and returns those of them whose channels fit.
template <class Tile>
__device__ __forceinline__ uint32_t prepare_fast(const Tile& tile, const Call& call, int sums_chunk, const FastShared& shared) {
  __shared__ bool misfit[32];
  const Uniform& u = call.uniform;
  const int columns = tile.t.columns_at_once;
  if (threadIdx.x < 32) misfit[threadIdx.x] = false;
  __syncthreads();
  for (int i = threadIdx.x; i < columns * u.chunks * kPoints; i += kThreads) {
    const int column = i & (columns - 1), k = i / columns, chunk = k / kPoints, q = k % kPoints / kGroup, j = k % kGroup - 2;
    float c = 0, scale = 0;
    if (tile.is_active(column) && k < call.size) {
      const int64_t channel = tile.channel_of(column);
      const float a = read<float>(call.alpha, channel, k), g = read<float>(call.gamma, channel, 0);
      if (!fits(u, call.size, g, a)) misfit[column] = true;
      scale = point_scale(u, g, k);
      c = a * scale;
    }
    float* of_chunk = shared.coefficients + (column * u.chunks + chunk) * kChunkFloats;
    of_chunk[kGroup * q + (j < 0 ? 2 - j : j)] = c;
    if (j == 2 || j == -2) of_chunk[kPoints + 2 * q + (j < 0)] = 2 * c;
    if (chunk == sums_chunk) shared.point_scales[k % kPoints * columns + column] = scale;
  }
  __syncthreads();
  return __ballot_sync(0xffffffffu, !misfit[threadIdx.x % 32]) & tile.active;
}

// One channel's fast path, for one thread.
template <class T, bool kVector> struct Fast {
  static constexpr int V = Tile<T, kVector>::kElements;
  const Tile<T, kVector>& tile;
  const Scales scales;
  const int chunks;
  const float first_anchor, slope_factor;
  const FastShared& shared;
  const float* coefficients;  // of the channel

  __device__ __forceinline__ Fast(const Tile<T, kVector>& t, const Call& call, const FastShared& s)
      : Fast(t, call.uniform, read<float>(call.gamma, t.channel(), 0), s) {}
  __device__ __forceinline__ Fast(const Tile<T, kVector>& t, const Uniform& u, float gamma, const FastShared& s)
      : tile(t), scales(scales_of(u, gamma)), chunks(u.chunks), first_anchor(u.first_anchor),
        slope_factor(-2 * gamma * u.step), shared(s), coefficients(s.coefficients + t.column * u.chunks * kChunkFloats) {}

  __device__ __forceinline__ Coefficients of_chunk(int c) const { return Coefficients(coefficients + c * kChunkFloats); }
  __device__ __forceinline__ float anchor(int c) const { return first_anchor + c * kPoints; }

  // y = f(x). Tensors are given by the thread's column.
  template <bool kOneChunk> __device__ __forceinline__ void forward(const T* x, T* y) const {
    const Coefficients head = of_chunk(0);
    for (int i = 0; i < tile.tiles; ++i) {
      float at[V], out[V];
      const auto place = tile.place(i);
      tile.load(x, place, at);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float z = clamp(at[v], scales.x_low, scales.x_high);
        const Powers p = powers(z, scales);
        out[v] = add_values(0.0f, z, p, first_anchor, scales, head);
        if constexpr (!kOneChunk)
          for (int c = 1; c < chunks; ++c) out[v] = add_values(out[v], z, p, anchor(c), scales, of_chunk(c));
      }
      tile.store(y, place, out);
    }
  }

  // dx, unless it is nullptr, and with kSums the sums of one chunk of points, left in shared.sums.
  template <bool kOneChunk, bool kSums>
  __device__ __forceinline__ void backward(const T* x, const T* grad, T* dx, int sums_chunk) const {
    const Coefficients own = of_chunk(sums_chunk);
    const float own_anchor = anchor(sums_chunk);
    float sums[kPoints] = {};
    for (int i = 0; i < tile.tiles; ++i) {
      float at[V], g[V], out[V];
      const auto place = tile.place(i);
      tile.load(x, place, at);
      tile.load(grad, place, g);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float z = clamp(at[v], scales.x_low, scales.x_high);
        const Powers p = powers(z, scales);
        float slope = add_slopes<kSums>(0.0f, z, g[v], p, own_anchor, scales, own, sums);
        if constexpr (!kOneChunk)
          for (int c = 0; dx && c < chunks; ++c)
            if (c != sums_chunk) slope = add_slopes<false>(slope, z, g[v], p, anchor(c), scales, of_chunk(c), sums);
        out[v] = g[v] * (slope_factor * slope);
      }
      if (dx) tile.store(dx, place, out);
    }
    if constexpr (kSums) {
#pragma unroll
      for (int k = 0; k < kPoints; ++k) shared.sums[k * kThreads + threadIdx.x] = sums[k];
    }
  }
};

}  // namespace kaf
