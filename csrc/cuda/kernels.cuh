// The kernels, and their launches for one type of tensors.
#pragma once
#include <algorithm>

#include "direct.cuh"
#include "even.cuh"

namespace kaf {

template <class T> constexpr bool kHasTables = std::is_same_v<typename Arithmetic<T>::type, float>;
static_assert(kWindow<float> == kEvenWindow, "calls with and without tables divide the points into the same windows");

// y = f(x)
template <class T, bool kVector>
__global__ void __launch_bounds__(kForwardThreads, kVector ? 3 : 2) forward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  constexpr int V = Tile<T, kVector, 8>::kElements;
  const Tile<T, kVector, 8> tile(call.tiling, blockIdx.x);
  float* const shared = reinterpret_cast<float*>(memory);
  const int64_t channel = tile.channel();
  stage_tables(call, channel, shared);
  const Curves curves(call, channel, shared);
  const T* x = tile.column_of(static_cast<const T*>(call.x));
  T* y = tile.column_of(static_cast<T*>(call.y));
  const auto each = [&](auto evaluate) {  // loops of their own have the registers for themselves
    for (int i = 0; i < tile.tiles; ++i) {
      const auto place = tile.place(i);
      float at[V], out[V] = {};
      tile.load(x, place, at);
#pragma unroll
      for (float& a : at) a = curves.clamped(a);
      evaluate(at, out);
      tile.store(y, place, out);
    }
  };
  if (curves.cells.count > 0) {
    each([&](const float (&at)[V], float (&out)[V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = curves.polynomial(curves.find(at[v]), 0);
    });
  } else {
    each([&](const float (&at)[V], float (&out)[V]) {
      curves.at_points(at, 0, call.size, [&](int v, float, float K, const Point& p) { out[v] += p.alpha * K; });
    });
  }
}

enum Sums { kNoSums, kOfAlpha, kOfAlphaAndDictionary };  // over elements, for each point of a window

// Sums over the threads of each column, use(k, column, total) for the first `count` of them. They come to lie where the
// tables were.
template <int N, class Tile, class Use>
__device__ __forceinline__ void put_sums(const float (&sums)[N], int count, const Tile& tile, float* shared, Use use) {
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) shared[k * kBackwardThreads + threadIdx.x] = sums[k];
  sum_over_threads(shared, count, tile, use);
}

// dx = g f′(x), and partial sums of the gradients of α, δ and γ.
template <class T, bool kVector, Sums kSums>
__global__ void __launch_bounds__(kBackwardThreads, kSums == kOfAlphaAndDictionary ? 2 : 3)
    backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  constexpr int V = Tile<T, kVector>::kElements, kOfPoint = kSums == kOfAlphaAndDictionary ? kEvenWindow : 1;
  float* const shared = reinterpret_cast<float*>(memory);
  const int window = static_cast<int>(blockIdx.x % static_cast<unsigned>(call.windows)), begin = window * kEvenWindow;
  const Tile<T, kVector> tile(call.tiling, blockIdx.x / static_cast<unsigned>(call.windows));
  const int64_t channel = tile.channel();
  if (window == 0) stage_tables(call, channel, shared);
  const Curves curves(call, channel, shared);
  const EvenSums even(call, curves.cells.gamma, window);
  const T* x = tile.column_of(static_cast<const T*>(call.x));
  const T* grad = tile.column_of(static_cast<const T*>(call.grad));
  T* dx = window == 0 ? tile.column_of(static_cast<T*>(call.dx)) : nullptr;
  const bool want_gamma = window == 0 && call.gamma_slot >= 0;
  float of_alpha[kEvenWindow] = {}, of_point[kOfPoint] = {}, of_gamma[1] = {};
  const auto each = [&](auto evaluate) {
    for (int i = 0; i < tile.tiles; ++i) {
      const auto place = tile.place(i);
      float at[V], g[V], out[V] = {};
      tile.load(x, place, at);
      tile.load(grad, place, g);
#pragma unroll
      for (float& a : at) a = curves.clamped(a);
      evaluate(at, g, out);
      if (dx) tile.store(dx, place, out);
    }
  };
  const auto look_up = [&](const float (&at)[V], const float (&g)[V], float (&out)[V]) {
    if (!dx && !want_gamma) return;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Curves::Place in_table = curves.find(at[v]);
      if (want_gamma) of_gamma[0] = fmaf(g[v], curves.polynomial(in_table, 1), of_gamma[0]);
      if (dx) out[v] = g[v] * curves.polynomial(in_table, 0);
    }
  };
  if (curves.cells.count > 0 && (kSums == kNoSums || (kSums == kOfAlpha && curves.cells.even))) {
    each([&](const float (&at)[V], const float (&g)[V], float (&out)[V]) {
      if constexpr (kSums == kOfAlpha) {
#pragma unroll
        for (int v = 0; v < V; ++v) even.add(at[v], g[v], of_alpha);
      }
      look_up(at, g, out);
    });
  } else {
    each([&](const float (&at)[V], const float (&g)[V], float (&out)[V]) {
      if constexpr (kSums != kNoSums) {
#pragma unroll
        for (int k = 0; k < kEvenWindow; ++k)
          curves.at_points(at, begin + k, min(begin + k + 1, call.size), [&](int v, float d, float K, const Point&) {
            of_alpha[k] = fmaf(g[v], K, of_alpha[k]);
            if constexpr (kSums == kOfAlphaAndDictionary) of_point[k] = fmaf(g[v] * K, d, of_point[k]);
          });
      }
      if (curves.cells.count > 0) return look_up(at, g, out);
      if (!dx && !want_gamma) return;
      curves.at_points(at, 0, call.size, [&](int v, float d, float K, const Point& p) {
        const float term = g[v] * (p.alpha * K) * d;
        out[v] += term;
        of_gamma[0] -= term * d;
      });
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] *= -2 * curves.cells.gamma;
    });
  }
  const Tile<T, kVector> own(call.tiling, again(blockIdx.x) / static_cast<unsigned>(call.windows));
  const int own_window = static_cast<int>(again(blockIdx.x) % static_cast<unsigned>(call.windows));
  const int first = own_window * kEvenWindow, count = min(kEvenWindow, call.size - first);
  if (kSums != kNoSums && call.alpha_slot >= 0)
    put_sums(of_alpha, count, own, shared, [&](int k, int column, float total) {
      const Cells& cells = call.tables.cells[own.channel_of(column)];
      const float scale = kSums == kOfAlpha && cells.even ? point_scale(call, cells.gamma, own_window, k) : 1;
      put_partial(own, call, call.alpha_slot + first + k, column, total * scale);
    });
  if constexpr (kSums == kOfAlphaAndDictionary)
    put_sums(of_point, count, own, shared, [&](int k, int column, float total) {
      const int64_t channel = own.channel_of(column);
      const Point& point = call.tables.points[channel * call.size + first + k];
      const float factor = 2 * call.tables.cells[channel].gamma * point.alpha;
      put_partial(own, call, call.dictionary_slot + first + k, column, factor * total);
    });
  if (own_window == 0 && call.gamma_slot >= 0)
    put_sums(of_gamma, 1, own, shared, [&](int, int column, float total) {
      put_partial(own, call, call.gamma_slot, column, total);
    });
}

// dgrad = v_x f′(x) + q(x), dx = v_x g f″(x) + g q′(x), and partial sums as in backward. Without kAlong q is 0, as in a
// gradient penalty; with it four tables of 42 KB leave room for one block.
template <class T, bool kVector, Sums kSums, bool kWithAlong>
__global__ void __launch_bounds__(kBackwardThreads, kWithAlong || kSums == kOfAlphaAndDictionary ? 1 : 2)
    double_backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  constexpr int V = Tile<T, kVector>::kElements, kOfPoint = kSums == kOfAlphaAndDictionary ? kEvenWindow : 1;
  float* const shared = reinterpret_cast<float*>(memory);
  const int window = static_cast<int>(blockIdx.x % static_cast<unsigned>(call.windows)), begin = window * kEvenWindow;
  const Tile<T, kVector> tile(call.tiling, blockIdx.x / static_cast<unsigned>(call.windows));
  const int64_t channel = tile.channel();
  if (window == 0) stage_tables(call, channel, shared);
  const Curves curves(call, channel, shared);
  const float gamma = curves.cells.gamma, v_gamma = kWithAlong ? read<float>(call.v_gamma, channel, 0) : 0;
  const T* x = tile.column_of(static_cast<const T*>(call.x));
  const T* grad = tile.column_of(static_cast<const T*>(call.grad));
  const T* v_x = tile.column_of(static_cast<const T*>(call.v_x));
  T* dx = window == 0 ? tile.column_of(static_cast<T*>(call.dx)) : nullptr;
  T* dgrad = window == 0 ? tile.column_of(static_cast<T*>(call.dgrad)) : nullptr;
  const bool want_gamma = window == 0 && call.gamma_slot >= 0;
  const auto terms = [&](int k, float d, float K, const Point& p) {
    return second_order(d, K, gamma, p.alpha, kWithAlong ? read<float>(call.v_alpha, channel, k) : 0.0f, v_gamma,
                        kWithAlong ? read<float>(call.v_dictionary, channel, k) : 0.0f);
  };
  float of_alpha[kEvenWindow] = {}, of_point[kOfPoint] = {}, of_gamma[1] = {};
  for (int i = 0; i < tile.tiles; ++i) {
    const auto place = tile.place(i);
    float at[V], g[V], v[V] = {}, out[V] = {}, out_grad[V] = {};
    tile.load(x, place, at);
#pragma unroll
    for (float& a : at) a = curves.clamped(a);
    tile.load(grad, place, g);
    if (v_x) tile.load(v_x, place, v);
    if (kSums != kNoSums) {
#pragma unroll
      for (int k = 0; k < kEvenWindow; ++k)
        curves.at_points(at, begin + k, min(begin + k + 1, call.size), [&](int e, float d, float K, const Point& p) {
          const SecondOrder<float> s = terms(begin + k, d, K, p);
          of_alpha[k] += v[e] * g[e] * s.alpha_x;
          if constexpr (kWithAlong) of_alpha[k] += g[e] * s.alpha_v;
          if constexpr (kSums == kOfAlphaAndDictionary) of_point[k] -= v[e] * g[e] * s.curvature;
          if constexpr (kSums == kOfAlphaAndDictionary && kWithAlong) of_point[k] -= g[e] * s.along_slope;
        });
    }
    if (!dx && !dgrad && !want_gamma) continue;
    if (curves.cells.count > 0) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const Curves::Place p = curves.find(at[e]);
        const float vg = v[e] * g[e];
        out_grad[e] = v[e] * curves.polynomial(p, 0);
        out[e] = vg * curves.polynomial(p, 1);
        if constexpr (kWithAlong) out_grad[e] += curves.polynomial(p, 2), out[e] += g[e] * curves.polynomial(p, 3);
        if (!want_gamma) continue;
        of_gamma[0] += vg * curves.polynomial(p, kWithAlong ? 4 : 2);
        if constexpr (kWithAlong) of_gamma[0] += g[e] * curves.polynomial(p, 5);
      }
    } else {
      for (int k = 0; k < call.size; ++k)
        curves.at_points(at, k, k + 1, [&](int e, float d, float K, const Point& p) {
          const SecondOrder<float> s = terms(k, d, K, p);
          const float vg = v[e] * g[e];
          out_grad[e] += v[e] * s.slope;
          out[e] += vg * s.curvature;
          of_gamma[0] += vg * s.gamma_x;
          if constexpr (!kWithAlong) return;
          out_grad[e] += s.along;
          out[e] += g[e] * s.along_slope;
          of_gamma[0] += g[e] * s.gamma_v;
        });
    }
    if (dx) tile.store(dx, place, out);
    if (dgrad) tile.store(dgrad, place, out_grad);
  }
  const Tile<T, kVector> own(call.tiling, again(blockIdx.x) / static_cast<unsigned>(call.windows));
  const int own_window = static_cast<int>(again(blockIdx.x) % static_cast<unsigned>(call.windows));
  const int first = own_window * kEvenWindow, count = min(kEvenWindow, call.size - first);
  const auto put = [&](const auto& sums, int n, int slot) {
    put_sums(sums, n, own, shared, [&](int k, int column, float total) {
      put_partial(own, call, slot + k, column, total);
    });
  };
  if (kSums != kNoSums && call.alpha_slot >= 0) put(of_alpha, count, call.alpha_slot + first);
  if constexpr (kSums == kOfAlphaAndDictionary) put(of_point, count, call.dictionary_slot + first);
  if (own_window == 0 && call.gamma_slot >= 0) put(of_gamma, 1, call.gamma_slot);
}

// All of these, without tables.
template <Order order, class T, bool kVector>
__global__ void __launch_bounds__(kThreads, order == kBackward ? 3 : 4) direct_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  const Tile<T, kVector> tile(call.tiling, blockIdx.x / call.windows);
  direct<order>(tile, call, static_cast<int>(blockIdx.x % call.windows), memory);
}

// One warp to an output: the sum of its partial sums over blocks, over the columns of its channel, and over channels
// where they share a row.
template <class A> __global__ void __launch_bounds__(kThreads) reduce_kernel(const Reduction r) {
  int64_t output = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int which = 0;
  for (; which < r.count && output >= r.gradients[which].rows * r.gradients[which].size; ++which)
    output -= r.gradients[which].rows * r.gradients[which].size;
  if (which == r.count) return;
  const Gradient& g = r.gradients[which];
  const int64_t row = output / g.size, k = output % g.size, columns = g.rows == 1 ? r.columns : r.columns_per_channel;
  const A* partial = static_cast<const A*>(r.partial) + row * columns * r.slots + g.slot + k;
  double total = 0;
  for (int64_t i = lane; i < r.chunks * columns; i += 32)
    total += partial[(i / columns * r.columns + i % columns) * r.slots];
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (lane > 0) return;
  if (g.is_double) static_cast<double*>(g.data)[output] = total;
  else static_cast<float*>(g.data)[output] = static_cast<float>(total);
}

template <class T, Order order> size_t shared_bytes(const Call& call) {
  const Tables& t = call.tables;
  if (!t.cells) return DirectShared<typename Arithmetic<T>::type, order>::bytes(call);
  const size_t tables = t.count * t.capacity * kCellBytes, sums = sizeof(float) * kEvenWindow * call.tiling.threads;
  return order == kForward ? tables : std::max(tables, sums);
}
using Kernel = void (*)(Call);
template <Order order, class T, bool kVector> Kernel kernel_of(const Call& call) {
  if constexpr (kHasTables<T>)
    if (call.tables.cells) {
      const auto with = [&](auto sums) -> Kernel {
        if constexpr (order == kForward) return forward_kernel<T, kVector>;
        if constexpr (order == kBackward) return backward_kernel<T, kVector, sums()>;
        const bool along = call.v_alpha.data || call.v_gamma.data || call.v_dictionary.data;
        if constexpr (order == kDoubleBackward)
          return along ? double_backward_kernel<T, kVector, sums(), true>
                       : double_backward_kernel<T, kVector, sums(), false>;
      };
      if (call.dictionary_slot >= 0) return with(std::integral_constant<Sums, kOfAlphaAndDictionary>());
      if (call.alpha_slot >= 0) return with(std::integral_constant<Sums, kOfAlpha>());
      return with(std::integral_constant<Sums, kNoSums>());
    }
  return direct_kernel<order, T, kVector>;
}

template <class T, Order order> int launch_of(const Call& call, Stream stream) {
  const Kernel kernel = call.tiling.vectors ? kernel_of<order, T, true>(call) : kernel_of<order, T, false>(call);
  const dim3 grid(static_cast<unsigned>(blocks_of(call.tiling) * call.windows));
  return launch(kernel, grid, call.tiling.threads, shared_bytes<T, order>(call), stream, call);
}

}  // namespace kaf
