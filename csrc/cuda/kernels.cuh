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
  stage_tables(tile, call, reinterpret_cast<float*>(memory));
  const Curves curves(tile, call, reinterpret_cast<float*>(memory));
  const T* x = tile.column_of(static_cast<const T*>(call.x));
  T* y = tile.column_of(static_cast<T*>(call.y));
  for (int i = 0; i < tile.tiles; ++i) {
    const auto place = tile.place(i);
    float at[V], out[V] = {};
    tile.load(x, place, at);
    if (curves.cells.count > 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = curves.polynomial(curves.find(at[v]));
    } else {
      curves.at_points(at, 0, call.size, [&](int v, float, float K, const Point& p) { out[v] += p.alpha * K; });
    }
    tile.store(y, place, out);
  }
}

enum Sums { kNoSums, kOfAlpha, kOfAlphaAndDictionary };  // over elements, for each point of a window

// dx = g f′(x), and partial sums of the gradients of α, δ and γ.
template <class T, bool kVector, Sums kSums>
__global__ void __launch_bounds__(kBackwardThreads, kSums == kOfAlphaAndDictionary ? 2 : 3) backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  constexpr int V = Tile<T, kVector>::kElements, kWithPoint = kSums == kOfAlphaAndDictionary ? kEvenWindow : 1;
  float* const shared = reinterpret_cast<float*>(memory);
  const int window = static_cast<int>(blockIdx.x % call.windows), begin = window * kEvenWindow;
  const Tile<T, kVector> tile(call.tiling, blockIdx.x / call.windows);
  if (window == 0) stage_tables(tile, call, shared);
  const Curves curves(tile, call, shared);
  const EvenSums even(call, curves.cells.gamma, window);
  const T* x = tile.column_of(static_cast<const T*>(call.x));
  const T* grad = tile.column_of(static_cast<const T*>(call.grad));
  T* dx = window == 0 ? tile.column_of(static_cast<T*>(call.dx)) : nullptr;
  const bool want_gamma = window == 0 && call.gamma_slot >= 0;
  const int of_gamma = call.tables.capacity * kCoefficients * 32;  // the second curve
  float of_alpha[kEvenWindow] = {}, of_point[kWithPoint] = {}, gamma_sum = 0;
  for (int i = 0; i < tile.tiles; ++i) {
    const auto place = tile.place(i);
    float at[V], g[V], out[V] = {};
    tile.load(x, place, at);
    tile.load(grad, place, g);
    if (kSums == kOfAlpha && curves.cells.even) {
#pragma unroll
      for (int v = 0; v < V; ++v) even.add(at[v], g[v], of_alpha);
    } else if (kSums != kNoSums) {
#pragma unroll
      for (int k = 0; k < kEvenWindow; ++k)
        curves.at_points(at, begin + k, begin + k + 1, [&](int v, float d, float K, const Point&) {
          of_alpha[k] = fmaf(g[v], K, of_alpha[k]);
          if constexpr (kSums == kOfAlphaAndDictionary) of_point[k] = fmaf(g[v] * K, d, of_point[k]);
        });
    }
    if (!dx && !want_gamma) continue;
    if (curves.cells.count > 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Curves::Place in_table = curves.find(at[v]);
        if (want_gamma) gamma_sum = fmaf(g[v], curves.polynomial(in_table, of_gamma), gamma_sum);
        if (dx) out[v] = g[v] * curves.polynomial(in_table);
      }
    } else {
      curves.at_points(at, 0, call.size, [&](int v, float d, float K, const Point& p) {
        const float term = g[v] * (p.alpha * K) * d;
        out[v] += term;
        gamma_sum -= term * d;
      });
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] *= -2 * curves.cells.gamma;
    }
    if (dx) tile.store(dx, place, out);
  }
  // Sums come to lie where the tables were.
  const auto put = [&](const auto& sums, int count, auto use) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(sums) / sizeof(float)); ++k) shared[k * kBackwardThreads + threadIdx.x] = sums[k];
    sum_over_threads(shared, count, tile, use);
  };
  const int count = min(kEvenWindow, call.size - begin);
  if (kSums != kNoSums && call.alpha_slot >= 0)
    put(of_alpha, count, [&](int k, int column, float total) {
      const Cells& cells = call.tables.cells[tile.channel_of(column)];
      const float scale = kSums == kOfAlpha && cells.even ? point_scale(call, cells.gamma, window, k) : 1;
      put_partial(tile, call, call.alpha_slot + begin + k, column, total * scale);
    });
  if constexpr (kSums == kOfAlphaAndDictionary)
    put(of_point, count, [&](int k, int column, float total) {
      const int64_t channel = tile.channel_of(column);
      const float factor = 2 * call.tables.cells[channel].gamma * call.tables.points[channel * call.tables.padded + begin + k].alpha;
      put_partial(tile, call, call.dictionary_slot + begin + k, column, factor * total);
    });
  if (want_gamma) {
    const float sums[1] = {gamma_sum};
    put(sums, 1, [&](int, int column, float total) { put_partial(tile, call, call.gamma_slot, column, total); });
  }
}

// Forward, backward and double backward, dgrad = v_x f′(x) + q(x) and dx = v_x g f″(x) + g q′(x), without tables.
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
  return order == kBackward ? std::max(tables, sums) : tables;
}
template <class T, bool kVector> auto* backward_kernel_of(const Call& call) {
  return call.dictionary_slot >= 0 ? backward_kernel<T, kVector, kOfAlphaAndDictionary>
         : call.alpha_slot >= 0    ? backward_kernel<T, kVector, kOfAlpha>
                                   : backward_kernel<T, kVector, kNoSums>;
}

template <class T, Order order> int launch_of(const Call& call, Stream stream) {
  const bool vectors = call.tiling.vectors;
  auto* kernel = vectors ? direct_kernel<order, T, true> : direct_kernel<order, T, false>;
  if constexpr (kHasTables<T> && order == kForward)
    if (call.tables.cells) kernel = vectors ? forward_kernel<T, true> : forward_kernel<T, false>;
  if constexpr (kHasTables<T> && order == kBackward)
    if (call.tables.cells) kernel = vectors ? backward_kernel_of<T, true>(call) : backward_kernel_of<T, false>(call);
  const dim3 grid(static_cast<unsigned>(blocks_of(call.tiling) * call.windows));
  return launch(kernel, grid, call.tiling.threads, shared_bytes<T, order>(call), stream, call);
}

}  // namespace kaf
