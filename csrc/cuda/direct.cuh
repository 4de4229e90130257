// The direct path: every element pays for every point, for a Gaussian with one exponential. It takes every dictionary, γ,
// kernel and derivative.
//
// Of the Gaussian itself, with d = x − δ, K = exp(−γ d²), v the gradients of the first gradients (kaf_math.h has the second
// derivatives):
//
//     forward           y = Σ_k α K
//     backward          dx = g Σ_k −2γ d α K         ∂α_k = Σ_n g K       ∂γ = −Σ_n g Σ_k α d² K     ∂δ_k = −Σ_n dx's k-th term
//     double backward   dgrad = v_x f′ + q           dx = v_x g f″ + g q′   and so on
//
// Points are staged in shared memory, as many as it holds; where they are more, again for each tile. δ is the sum of two
// numbers, so that x − δ loses nothing where Gaussians are narrow.
//
// Napkin: float32, D = 20, an element costs 20 exponentials, 2 cycles of a multiprocessor a warp each, where memory takes
// 18 forward, 27 backward, 44 in double backward: so this path is bound by them forward and backward.
#pragma once
#include "base.cuh"
#include "kappa.cuh"

namespace kaf {

enum Order { kForward, kBackward, kDoubleBackward };

template <class A> constexpr int kStaged = 1024 / sizeof(A);  // points times columns that are staged at once

template <class A, Order order> struct DirectShared {
  static constexpr int kFields = order == kDoubleBackward ? 5 : 3;  // δ high, δ low, α, then v_α, v_δ
  A *points, *sums;                                                 // [kFields][kStaged], [α and δ][kWindow][threads]

  __device__ __forceinline__ explicit DirectShared(unsigned char* memory)
      : points(reinterpret_cast<A*>(memory)), sums(points + kFields * kStaged<A>) {}
  static size_t bytes(const Call& call) {
    const int kinds = (call.dalpha.slot >= 0) + (call.ddictionary.slot >= 0), single = call.dgamma.slot >= 0;
    return sizeof(A) * (kFields * kStaged<A> + (kinds * kWindow<A> + single) * call.tiling.threads);
  }
};

template <Order order, class A, class Tile>
__device__ __forceinline__ void stage(const Tile& tile, const Call& call, int begin, int count, A* points) {
  const int columns = tile.t.columns_at_once;
  for (int i = threadIdx.x; i < count * columns; i += tile.t.threads) {
    const int column = i & (columns - 1), k = begin + (i >> tile.t.columns_shift);
    if (!tile.is_active(column)) continue;
    const int64_t channel = tile.channel_of(column);
    const Split<A> delta = point<A>(call, channel, k);
    points[i] = delta.high;
    points[kStaged<A> + i] = delta.low;
    points[2 * kStaged<A> + i] = read<A>(call.alpha, channel, k);
    if constexpr (order == kDoubleBackward) {
      points[3 * kStaged<A> + i] = read<A>(call.v_alpha, channel, k);
      points[4 * kStaged<A> + i] = read<A>(call.v_dictionary, channel, k);
    }
  }
}

// `window` says which points' sums this block forms; the first also writes what is not a sum over elements.
template <Order order, bool kAnyPsi, class T, bool kVector, int kApart>
__device__ __forceinline__ void direct(const Tile<T, kVector, kApart>& tile, const Call& call, int window, unsigned char* memory) {
  using A = typename Arithmetic<T>::type;
  constexpr int V = Tile<T, kVector, kApart>::kElements;
  const DirectShared<A, order> shared(memory);
  const int columns = tile.t.columns_at_once, at_once = kStaged<A> >> tile.t.columns_shift, threads = tile.t.threads;
  const A gamma = read<A>(call.gamma, tile.channel(), 0), scale = gaussian_scale(gamma);
  const Kappa<kAnyPsi, A> kappa(call, read<double>(call.gamma, tile.channel(), 0));
  const A v_gamma = order == kDoubleBackward ? read<A>(call.v_gamma, tile.channel(), 0) : A(0);
  const T* x = tile.column_of(static_cast<const T*>(call.x));
  const T* grad = order == kForward ? nullptr : tile.column_of(static_cast<const T*>(call.grad));
  const T* v_x = order == kDoubleBackward ? tile.column_of(static_cast<const T*>(call.v_x)) : nullptr;
  T* result = order == kForward ? tile.column_of(static_cast<T*>(call.y)) : tile.column_of(static_cast<T*>(call.dx));
  T* dgrad = order == kDoubleBackward ? tile.column_of(static_cast<T*>(call.dgrad)) : nullptr;

  const bool writes = window == 0, want_alpha = call.dalpha.slot >= 0, want_dictionary = call.ddictionary.slot >= 0;
  const bool want_gamma = writes && call.dgamma.slot >= 0, want_sums = want_alpha || want_dictionary;
  const int window_begin = window * kWindow<A>, window_end = min(window_begin + kWindow<A>, call.size);
  A *const alpha_sums = shared.sums + threadIdx.x, *const dictionary_sums = alpha_sums + (want_alpha ? kWindow<A> * threads : 0);
  if (want_sums)
    for (int i = 0; i < kWindow<A>; ++i) {
      if (want_alpha) alpha_sums[i * threads] = 0;
      if (want_dictionary) dictionary_sums[i * threads] = 0;
    }
  A gamma_sum = 0;

  const int begin = writes ? 0 : window_begin, end = writes ? call.size : window_end;
  const bool stage_once = end - begin <= at_once;
  if (stage_once) {
    stage<order>(tile, call, begin, end - begin, shared.points);
    __syncthreads();
  }
  for (int i = 0; i < tile.tiles; ++i) {
    A at[V], g[V] = {}, v[V] = {}, out[V] = {}, out_grad[V] = {};
    const auto place = tile.place(i);
    tile.load(x, place, at);
    if (grad) tile.load(grad, place, g);
    if (v_x) tile.load(v_x, place, v);
#pragma unroll
    for (int e = 0; e < V; ++e) at[e] = clamp(at[e], A(-1e18), A(1e18));
    for (int staged = begin; staged < end; staged += at_once) {
      const int count = min(at_once, end - staged);
      if (!stage_once) {
        __syncthreads();
        stage<order>(tile, call, staged, count, shared.points);
        __syncthreads();
      }
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        const A* p = shared.points + k * columns + tile.column;
        const A high = p[0], low = p[kStaged<A>], alpha = p[2 * kStaged<A>];
        A alpha_sum = 0, x_sum = 0;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          A d = (at[e] - high) - low;
          if constexpr (order == kForward) out[e] += alpha * kappa(d).here;
          if constexpr (order == kBackward) {
            const PsiValues<A> psi = kappa(d);
            const A weight = g[e] * alpha, term = weight * psi.by_x;
            out[e] += term;
            x_sum += term;
            alpha_sum += g[e] * psi.here;
            gamma_sum += weight * psi.by_gamma;
          }
          if constexpr (order == kDoubleBackward) {
            const A K = gaussian(d, scale);
            d = K == 0 ? A(0) : d;  // an infinite distance times 0
            const SecondOrder<A> s = second_order(d, K, gamma, alpha, p[3 * kStaged<A>], v_gamma, p[4 * kStaged<A>]);
            const A vg = v[e] * g[e], term = vg * s.curvature + g[e] * s.along_slope;
            out_grad[e] += v[e] * s.slope + s.along;
            out[e] += term;
            x_sum += term;
            alpha_sum += vg * s.alpha_x + g[e] * s.alpha_v;
            gamma_sum += vg * s.gamma_x + g[e] * s.gamma_v;
          }
        }
        const int w = staged + k - window_begin;
        if (want_sums && w >= 0 && w < kWindow<A>) {
          if (want_alpha) alpha_sums[w * threads] += alpha_sum;
          if (want_dictionary) dictionary_sums[w * threads] += x_sum;
        }
      }
    }
    if (!writes) continue;
    constexpr Factor kOfResult = order == kForward ? kOfHere : order == kBackward ? kOfByX : kOne;
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = kappa.scaled(kOfResult, out[e]);
    constexpr int kOwnOrder = kAnyPsi ? kAnyOrder : order;
    if constexpr (order == kForward) add_base<kOwnOrder>(call, tile, place, out, x);
    if constexpr (order == kBackward)
      if (result) add_base<kOwnOrder>(call, tile, place, out, x, grad);
    if constexpr (order == kDoubleBackward)
      if (v_x) {
        if (dgrad) add_base<1>(call, tile, place, out_grad, x, v_x);
        if (result) add_base<2>(call, tile, place, out, x, v_x, grad);
      }
    if (result) tile.store(result, place, out);
    if (dgrad) tile.store(dgrad, place, out_grad);
  }

  const int in_window = window_end - window_begin;
  const auto scaled = [&](int column, Factor factor, A sum) {
    const double of_column = read<double>(call.gamma, tile.channel_of(column), 0);
    return Kappa<kAnyPsi, A>(call, of_column).scaled(order == kBackward ? factor : kOne, sum);
  };
  if (want_alpha)
    sum_over_threads(shared.sums, in_window, tile, [&](int w, int column, A total) {
      put_partial(tile, call, call.dalpha.slot + window_begin + w, column, scaled(column, kOfHere, total));
    });
  if (want_dictionary)
    sum_over_threads(dictionary_sums - threadIdx.x, in_window, tile, [&](int w, int column, A total) {
      put_partial(tile, call, call.ddictionary.slot + window_begin + w, column, -scaled(column, kOfByX, total));
    });
  if (want_gamma) {
    A* const sums = dictionary_sums - threadIdx.x + (want_dictionary ? kWindow<A> * threads : 0);
    sums[threadIdx.x] = kappa.scaled(order == kBackward ? kOfByGamma : kOne, gamma_sum);
    sum_over_threads(sums, 1, tile, [&](int, int column, A total) { put_partial(tile, call, call.dgamma.slot, column, total); });
  }
  if constexpr (order != kForward) finish<A>(tile, call, window);
}

}  // namespace kaf
