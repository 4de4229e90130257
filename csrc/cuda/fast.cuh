// The fast path: a uniform dictionary in float32 arithmetic, at six exponentials and reciprocals for twenty points.
//
// Points are taken in groups of 2h + 1 around an anchor. With e = (x − anchor) / Δ, t = γΔ², r = exp(2γΔx), s = 1 / r, x
// measured from the middle of the dictionary, and anchors a in steps of Δ from there,
//
//     exp(−γ (x − δ)²) = E r^j e^(−t j² − 2 t a j),    E = exp(−t e²),    j = −h … h the point's place in its group
//
// so that with c_j = α e^(−t j² − 2 t a j), for h = 2,
//
//     f    = Σ_groups E P,                P = c0 + r (c1 + r c2) + s (c−1 + s c−2)
//     f′   = −2t/Δ Σ_groups E (e P − Q),  Q = r (c1 + 2 r c2) − s (c−1 + 2 s c−2)
//     ∂α_j = e^(−t j² − 2 t a j) Σ_n g E r^j
//
// An element costs an exponential for each group, one for r and a reciprocal. x is clamped to where every E is 0, and the
// path is taken where no power can overflow before that: see fits.
//
// Napkin: float32, D = 20, forward moves 8 bytes an element, backward 12. An H100 moves 3.35 TB/s with 132 × 4 × 32 lanes
// at 1.98 GHz, so 80 and 120 instructions an element fit into the time that memory takes, and 10 and 15 exponentials.
// Counted by hand for h = 2: clamp 2, r and s 7, and for each group e 2, E 3, P 4 and its sum 1 forward, 49 in all;
// backward 95, with r² and s² 2, and for each group Q 4, e P − Q 1, g E 1, sums 5. For bfloat16, half the bytes, h = 5
// forward: 43 where memory allows 40. docs/gpu-static.md counts the machine code.
#pragma once
#include "tiles.cuh"

namespace kaf {

constexpr float kGroupReach = 9.4868f;  // exp(−reach²) is below the smallest float32

// How points are divided: groups of 2 kHalf + 1, and windows of as many groups as the kernels have straight code for.
template <int half> struct Groups {
  static constexpr int kHalf = half, kSize = 2 * half + 1, kCount = (20 + kSize - 1) / kSize, kPoints = kSize * kCount;
  static constexpr bool kDoubled = half == 2;  // whether 2 c_j is kept for j = ±2, which f′ needs
  static constexpr int kFloats = (kPoints + (kDoubled ? 2 * kCount : 0) + 3) / 4 * 4;  // of a window's coefficients

  static KAF_FN int windows(int size) { return (size + kPoints - 1) / kPoints; }
  static KAF_FN float first_anchor(int size) { return kHalf - 0.5f * (size - 1); }
  static KAF_FN float last_anchor(int size) { return first_anchor(size) + (size + kSize - 1) / kSize * kSize - kSize; }

  // Where a window has c_j of its group q, and 2 c_j.
  static KAF_FN int at(int q, int j) { return kSize * q + (j < 0 ? kHalf - j : j); }
  static KAF_FN int doubled_at(int q, int j) { return kPoints + 2 * q + (j < 0); }
};

// What all points of one channel share.
struct Scales {
  float high, low;              // c · x ≈ high · x + low · x, for 1 / Δ
  float kappa_high, kappa_low;  // the same for 2γΔ log2 e
  float exponent;               // −t log2 e
  float x_low, x_high;          // x is clamped to these
};

// a (high + low) to nearly twice the precision.
KAF_FN Split<float> times(float a, Split<float> b) {
  const float high = a * b.high;
  return {high, fmaf(a, b.low, fmaf(a, b.high, -high))};
}

// Whether the path is right for a channel. No power overflows: the largest is α e^(2 t j e), with e from the far end of the
// tails to the farthest anchor, and with 1 for a smaller α, since sums over elements and 0 e^(2 t j e) have no α that would
// keep them finite. And t is moderate, as E is e^(−t h²) where K = 1, so that rounding its exponent costs about t h²
// roundings of K. False for NaN.
template <class G> __device__ __forceinline__ bool fits(const Uniform& u, int size, float gamma, float alpha) {
  const float t = gamma * u.step * u.step;
  if (!(t >= 1.0f / 1024 && t <= 0.51f)) return false;
  const float farthest = G::last_anchor(size) - G::first_anchor(size) + kGroupReach / sqrtf(t);
  const float most = exp2_approx(120 - 1.44269504f * 2 * G::kHalf * t * farthest);
  return most >= 1 && fabsf(alpha) <= most;
}

template <class G> __device__ __forceinline__ Scales scales_of(const Uniform& u, int size, float gamma) {
  const Split<float> kappa = times(gamma, u.kappa_by_gamma), t = times(gamma, u.t_by_gamma);
  const float reach = kGroupReach / sqrtf(gamma * u.step * u.step);
  return {u.inverse_step.high, u.inverse_step.low, kappa.high, kappa.low, -t.high,
          (G::first_anchor(size) - reach) * u.step, (G::last_anchor(size) + reach) * u.step};
}

// e^(−t j² − 2 t a j) of point k, with j and a those of its group.
template <class G> __device__ __forceinline__ float point_scale(const Uniform& u, int size, float gamma, int k) {
  const int j = k % G::kSize - G::kHalf;
  const float a = G::first_anchor(size) + k / G::kSize * G::kSize, n = -j * (j + 2 * a);  // n is exact
  const Split<float> z = times(n, times(gamma, u.t_by_gamma));
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

template <class G> struct Coefficients {
  float c[G::kFloats];

  __device__ __forceinline__ explicit Coefficients(const float* shared) {
#pragma unroll
    for (int i = 0; i < G::kFloats; i += 4)
      *reinterpret_cast<Vector16<float>*>(c + i) = *reinterpret_cast<const Vector16<float>*>(shared + i);
  }
  __device__ __forceinline__ float operator()(int q, int j) const { return c[G::at(q, j)]; }
  __device__ __forceinline__ float twice(int q, int j) const { return c[G::doubled_at(q, j)]; }
};

struct GroupPlace {
  float e, gaussian;  // (x − anchor) / Δ, E
};
__device__ __forceinline__ GroupPlace place(float x, float anchor, const Scales& c) {
  const float e = fmaf(x, c.low, fmaf(x, c.high, -anchor));
  return {e, exp2_approx(c.exponent * e * e)};
}

// P of one group.
template <class G> __device__ __forceinline__ float polynomial(int q, Powers p, const Coefficients<G>& c) {
  float right = c(q, G::kHalf), left = c(q, -G::kHalf);
#pragma unroll
  for (int j = G::kHalf - 1; j > 0; --j) right = fmaf(p.r, right, c(q, j)), left = fmaf(p.s, left, c(q, -j));
  return fmaf(p.s, left, fmaf(p.r, right, c(q, 0)));
}

// Σ E P over a window whose first anchor is given, added to y.
template <class G>
__device__ __forceinline__ float add_values(float y, float x, Powers p, float anchor, const Scales& s, const Coefficients<G>& c) {
#pragma unroll
  for (int q = 0; q < G::kCount; ++q) y = fmaf(place(x, anchor + G::kSize * q, s).gaussian, polynomial(q, p, c), y);
  return y;
}

// Σ E (e P − Q) over a window, added to slope; and, with kSums, g E r^j to sums.
template <bool kSums, class G>
__device__ __forceinline__ float add_slopes(float slope, float x, float g, Powers p, float anchor, const Scales& s,
                                            const Coefficients<G>& c, float (&sums)[G::kPoints]) {
  static_assert(G::kHalf == 2, "Q is written out");
  const float rr = p.r * p.r, ss = p.s * p.s;
#pragma unroll
  for (int q = 0; q < G::kCount; ++q) {
    const GroupPlace at = place(x, anchor + G::kSize * q, s);
    const float up = p.r * fmaf(p.r, c.twice(q, 2), c(q, 1)), down = fmaf(p.s, c.twice(q, -2), c(q, -1));
    slope = fmaf(at.gaussian, fmaf(p.s, down, fmaf(at.e, polynomial(q, p, c), -up)), slope);
    if constexpr (kSums) {
      const float w = g * at.gaussian;
      float* of_group = sums + G::kSize * q;  // j = −2 … 2
      of_group[0] = fmaf(w, ss, of_group[0]);
      of_group[1] = fmaf(w, p.s, of_group[1]);
      of_group[2] += w;
      of_group[3] = fmaf(w, p.r, of_group[3]);
      of_group[4] = fmaf(w, rr, of_group[4]);
    }
  }
  return slope;
}

// The shared memory of a block: coefficients [columns_at_once][windows][kFloats], scales of the points of one window
// [kPoints][columns_at_once], and behind them sums [kPoints][kThreads].
template <class G> struct FastShared {
  float *coefficients, *point_scales, *sums;
  __device__ __forceinline__ FastShared(unsigned char* memory, int columns, int size) {
    coefficients = reinterpret_cast<float*>(memory);
    point_scales = coefficients + columns * G::windows(size) * G::kFloats;
    sums = point_scales + G::kPoints * columns;
  }
  static size_t bytes(int columns, int size, bool sums) {
    return sizeof(float) * (columns * G::windows(size) * G::kFloats + G::kPoints * columns + (sums ? G::kPoints * kThreads : 0));
  }
};

// Fills shared memory for the columns that are active, and returns those of them whose channels fit.
template <class G, class Tile>
__device__ __forceinline__ uint32_t prepare_fast(const Tile& tile, const Call& call, int sums_window, const FastShared<G>& shared) {
  __shared__ bool misfit[32];
  const Uniform& u = call.uniform;
  const int columns = tile.t.columns_at_once, windows = G::windows(call.size);
  if (threadIdx.x < 32) misfit[threadIdx.x] = false;
  __syncthreads();
  for (int i = threadIdx.x; i < columns * windows * G::kPoints; i += kThreads) {
    const int column = i & (columns - 1), k = i / columns, window = k / G::kPoints;
    const int q = k % G::kPoints / G::kSize, j = k % G::kSize - G::kHalf;
    float c = 0, scale = 0;
    if (tile.is_active(column) && k < call.size) {
      const int64_t channel = tile.channel_of(column);
      const float a = read<float>(call.alpha, channel, k), g = read<float>(call.gamma, channel, 0);
      if (!fits<G>(u, call.size, g, a)) misfit[column] = true;
      scale = point_scale<G>(u, call.size, g, k);
      c = a * scale;
    }
    float* of_window = shared.coefficients + (column * windows + window) * G::kFloats;
    of_window[G::at(q, j)] = c;
    if (G::kDoubled && (j == 2 || j == -2)) of_window[G::doubled_at(q, j)] = 2 * c;
    if (window == sums_window) shared.point_scales[k % G::kPoints * columns + column] = scale;
  }
  __syncthreads();
  return __ballot_sync(0xffffffffu, !misfit[threadIdx.x % 32]) & tile.active;
}

// One channel's fast path, for one thread.
template <class T, bool kVector, class G> struct Fast {
  static constexpr int V = Tile<T, kVector>::kElements;
  const Tile<T, kVector>& tile;
  const Scales scales;
  const int windows;
  const float first_anchor, slope_factor;
  const FastShared<G>& shared;
  const float* coefficients;  // of the channel

  __device__ __forceinline__ Fast(const Tile<T, kVector>& t, const Call& call, const FastShared<G>& s)
      : Fast(t, call, read<float>(call.gamma, t.channel(), 0), s) {}
  __device__ __forceinline__ Fast(const Tile<T, kVector>& t, const Call& call, float gamma, const FastShared<G>& s)
      : tile(t), scales(scales_of<G>(call.uniform, call.size, gamma)), windows(G::windows(call.size)),
        first_anchor(G::first_anchor(call.size)), slope_factor(-2 * gamma * call.uniform.step), shared(s),
        coefficients(s.coefficients + t.column * G::windows(call.size) * G::kFloats) {}

  __device__ __forceinline__ Coefficients<G> of_window(int w) const { return Coefficients<G>(coefficients + w * G::kFloats); }
  __device__ __forceinline__ float anchor(int w) const { return first_anchor + w * G::kPoints; }

  // y = f(x). Tensors are given by the thread's column.
  template <bool kOneWindow> __device__ __forceinline__ void forward(const T* x, T* y) const {
    const Coefficients<G> head = of_window(0);
    auto place = tile.place(0);
    T next[V];
    tile.fetch(x, place, next);
    for (int i = 0; i < tile.tiles; ++i) {
      const auto here = place;
      float at[V], out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) at[v] = to_arithmetic(next[v]);
      place = tile.place(i + 1);  // fetched while this tile is computed; behind the last, nothing exists
      tile.fetch(x, place, next);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float z = clamp(at[v], scales.x_low, scales.x_high);
        const Powers p = powers(z, scales);
        out[v] = add_values(0.0f, z, p, first_anchor, scales, head);
        if constexpr (!kOneWindow)
          for (int w = 1; w < windows; ++w) out[v] = add_values(out[v], z, p, anchor(w), scales, of_window(w));
      }
      tile.store(y, here, out);
    }
  }

  // dx, unless it is nullptr, and with kSums the sums of one window of points, left in shared.sums.
  template <bool kOneWindow, bool kSums>
  __device__ __forceinline__ void backward(const T* x, const T* grad, T* dx, int sums_window) const {
    const Coefficients<G> own = of_window(sums_window);
    const float own_anchor = anchor(sums_window);
    float sums[G::kPoints] = {};
    auto place = tile.place(0);
    T next[V], next_grad[V];
    tile.fetch(x, place, next);
    tile.fetch(grad, place, next_grad);
    for (int i = 0; i < tile.tiles; ++i) {
      const auto here = place;
      float at[V], g[V], out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) at[v] = to_arithmetic(next[v]), g[v] = to_arithmetic(next_grad[v]);
      place = tile.place(i + 1);  // as in forward
      tile.fetch(x, place, next);
      tile.fetch(grad, place, next_grad);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float z = clamp(at[v], scales.x_low, scales.x_high);
        const Powers p = powers(z, scales);
        float slope = add_slopes<kSums>(0.0f, z, g[v], p, own_anchor, scales, own, sums);
        if constexpr (!kOneWindow)
          for (int w = 0; dx && w < windows; ++w)
            if (w != sums_window) slope = add_slopes<false>(slope, z, g[v], p, anchor(w), scales, of_window(w), sums);
        out[v] = g[v] * (slope_factor * slope);
      }
      if (dx) tile.store(dx, here, out);
    }
    if constexpr (kSums) {
#pragma unroll
      for (int k = 0; k < G::kPoints; ++k) shared.sums[k * kThreads + threadIdx.x] = sums[k];
    }
  }
};

}  // namespace kaf
