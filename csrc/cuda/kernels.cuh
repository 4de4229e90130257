// The kernels, and their launches for one type of tensors.
#pragma once
#include "direct.cuh"
#include "fast.cuh"

namespace kaf {

// The groups of points of the fast path: fewer and wider ones where y is rounded to half precision anyway.
template <class T> using ForwardGroups = Groups<sizeof(T) == 2 ? 5 : 2>;
using BackwardGroups = Groups<2>;

template <class T> constexpr bool kHasFastPath = std::is_same_v<typename Arithmetic<T>::type, float>;

// Both paths, for the channels that each is right for: which one a channel takes does not depend on its neighbours.

// y = f(x)
template <class T, bool kVector> __global__ void __launch_bounds__(kThreads, 4) forward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  Tile<T, kVector> tile(call.tiling, blockIdx.x);
  if constexpr (kHasFastPath<T>) {
    if (call.fast) {
      const uint32_t all = tile.active;
      const FastShared<ForwardGroups<T>> shared(memory, tile.t.columns_at_once, call.size);
      tile.active = prepare_fast(tile, call, 0, shared);
      if (tile.active) {
        const Fast<T, kVector, ForwardGroups<T>> fast(tile, call, shared);
        const T* x = tile.column_of(static_cast<const T*>(call.x));
        T* y = tile.column_of(static_cast<T*>(call.y));
        fast.windows == 1 ? fast.template forward<true>(x, y) : fast.template forward<false>(x, y);
      }
      tile.active ^= all;
      if (!tile.active) return;
      __syncthreads();
    }
  }
  direct<kForward>(tile, call, 0, memory);
}

// dx = g f′(x), and partial sums of the gradients of α, δ and γ; blockIdx.y is the window of points whose sums it forms.
template <class T, bool kVector> __global__ void __launch_bounds__(kThreads, 3) backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  Tile<T, kVector> tile(call.tiling, blockIdx.x);
  const int window = blockIdx.y;
  if constexpr (kHasFastPath<T>) {
    if (call.fast) {
      const uint32_t all = tile.active;
      const int columns = tile.t.columns_at_once;
      const FastShared<BackwardGroups> shared(memory, columns, call.size);
      tile.active = prepare_fast(tile, call, window, shared);
      if (tile.active) {
        const Fast<T, kVector, BackwardGroups> fast(tile, call, shared);
        const T* x = tile.column_of(static_cast<const T*>(call.x));
        const T* grad = tile.column_of(static_cast<const T*>(call.grad));
        T* dx = window == 0 ? tile.column_of(static_cast<T*>(call.dx)) : nullptr;
        if (call.alpha_slot < 0) {
          fast.template backward<false, false>(x, grad, dx, 0);
        } else {
          if (fast.windows == 1) fast.template backward<true, true>(x, grad, dx, 0);
          else fast.template backward<false, true>(x, grad, dx, window);
          sum_over_threads(shared.sums, BackwardGroups::kPoints, tile, [&](int w, int column, float total) {
            const int k = window * BackwardGroups::kPoints + w;
            if (k < call.size)
              put_partial<float>(tile, call, call.alpha_slot + k, column, total * shared.point_scales[w * columns + column]);
          });
        }
      }
      tile.active ^= all;
      if (!tile.active) return;
      __syncthreads();
    }
  }
  direct<kBackward>(tile, call, window, memory);
}

// dgrad = v_x f′(x) + q(x), dx = v_x g f″(x) + g q′(x), and partial sums as in backward.
template <class T, bool kVector> __global__ void __launch_bounds__(kThreads, 4) double_backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  direct<kDoubleBackward>(Tile<T, kVector>(call.tiling, blockIdx.x), call, blockIdx.y, memory);
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

// The shared memory and the windows of a call.
template <class T, Order order> size_t shared_bytes(const Call& call) {
  const size_t direct = DirectShared<typename Arithmetic<T>::type, order>::bytes(call);
  if (order == kDoubleBackward || !kHasFastPath<T> || !call.fast) return direct;
  using G = std::conditional_t<order == kForward, ForwardGroups<T>, BackwardGroups>;
  const size_t fast = FastShared<G>::bytes(call.tiling.columns_at_once, call.size, call.alpha_slot >= 0);
  return fast > direct ? fast : direct;
}
template <class T> unsigned windows(const Call& call) {
  constexpr int size = kWindow<typename Arithmetic<T>::type>;
  static_assert(!kHasFastPath<T> || size == BackwardGroups::kPoints, "both paths divide the points into the same windows");
  return call.alpha_slot >= 0 || call.dictionary_slot >= 0 ? (call.size + size - 1) / size : 1;
}

template <class T> int forward_of(const Call& call, Stream stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(call.tiling)));
  return launch(call.tiling.vectors ? forward_kernel<T, true> : forward_kernel<T, false>, grid,
                shared_bytes<T, kForward>(call), stream, call);
}
template <class T> int backward_of(const Call& call, Stream stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(call.tiling)), windows<T>(call));
  return launch(call.tiling.vectors ? backward_kernel<T, true> : backward_kernel<T, false>, grid,
                shared_bytes<T, kBackward>(call), stream, call);
}
template <class T> int double_backward_of(const Call& call, Stream stream) {
  const dim3 grid(static_cast<unsigned>(blocks_of(call.tiling)), windows<T>(call));
  return launch(call.tiling.vectors ? double_backward_kernel<T, true> : double_backward_kernel<T, false>, grid,
                shared_bytes<T, kDoubleBackward>(call), stream, call);
}

}  // namespace kaf
