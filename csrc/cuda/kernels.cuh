// The kernels, and their launches for one type of tensors.
#pragma once
#include <algorithm>
#include <iterator>

#include "answers.cuh"
#include "direct.cuh"
#include "even.cuh"

namespace kaf {

template <class T> constexpr bool kHasTables = std::is_same_v<typename Arithmetic<T>::type, float>;
// Single elements of half precision are half as many bytes: twice as many are under way, where registers are left.
template <class T> constexpr int kMore = sizeof(T) == 2 ? 2 : 1;
template <bool kAnswers> using Lookup = std::conditional_t<kAnswers, Answers, SharedCurves>;
static_assert(kWindow<float> == kEvenWindow, "calls with and without tables divide the points into the same windows");

// Blocks on a multiprocessor that registers are kept for, where its shared memory holds the tables of four.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 3;
#else
constexpr int kMostBlocks = 4;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kEvenBlocks = 3;
#else
constexpr int kEvenBlocks = 2;  // where three would spill
#endif
template <bool kVector, bool kEvenly, bool kBase>
constexpr int kForwardBlocks = !kVector ? (kEvenly && !kBase ? kEvenBlocks : 2) : kBase ? 3 : kMostBlocks;

// y = f(x)
template <class T, bool kVector, bool kEvenly, bool kAnswers, bool kBase>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<kVector, kEvenly, kBase>)
    forward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  using Part = Tile<T, kVector, 8, kEvenly>;
  const int64_t channel = Part(call.tiling, again(blockIdx.x)).channel();  // of another tile, which keeps no registers
  Lookup<kAnswers>::template prepare<kForwardThreads>(call, channel, shared);
  const Part tile(call.tiling, blockIdx.x);
  const Lookup<kAnswers> curve(call, tile.channel(), shared);
  const auto each = [&](const auto& part, auto evaluate) {  // loops of their own have the registers for themselves
    const T* x = part.column_of(static_cast<const T*>(call.x));
    T* y = part.column_of(static_cast<T*>(call.y));
    for (int i = 0; i < part.tiles; ++i) {
      const auto place = part.place(i);
      constexpr int V = std::decay_t<decltype(part)>::kElements;
      T raw[V];
      float at[V], out[V] = {};
      part.fetch(x, place, raw);
#pragma unroll
      for (int v = 0; v < V; ++v) at[v] = curve.clamped(to_arithmetic(raw[v]));
      evaluate(raw, at, out);
      if constexpr (kBase) add_base<0>(call, part, place, out, x);
      part.store(y, place, out);
    }
  };
  if (curve.cells.count > 0) {
    each(tile, [&](const auto& raw, const auto& at, auto& out) {
#pragma unroll
      for (int v = 0; v < static_cast<int>(std::size(at)); ++v) out[v] = curve(raw[v], at[v]);
    });
  } else {  // few at once: exponentials are what they wait for
    each(Tile<T, false, 2>(call.tiling, again(blockIdx.x)), [&](const auto&, const auto& at, auto& out) {
      curve.at_points(at, 0, call.size, [&](int v, float, float K, const Point& p) { out[v] += p.alpha * K; });
    });
  }
}

enum Sums { kNoSums, kOfAlpha, kOfAlphaAndDictionary };  // over elements, for each point of a window

// What a block of backward or double backward has: elements, and the window of points whose sums it forms. The blocks of
// the first window write what is not a sum over elements, and sum for γ.
template <class T, bool kVector, int kApart = 4> struct Share {
  const int window, begin, count;  // the window, its first point, and how many
  const Tile<T, kVector, kApart> tile;

  __device__ __forceinline__ Share(const Call& call, uint32_t block)
      : window(static_cast<int>(block - quotient(block, call.windows) * call.windows.by)), begin(window * kEvenWindow),
        count(min(kEvenWindow, call.size - begin)), tile(call.tiling, quotient(block, call.windows)) {}

  __device__ __forceinline__ const T* input(const void* data) const {
    return tile.column_of(static_cast<const T*>(data));
  }
  __device__ __forceinline__ T* output(void* data) const {
    return window == 0 ? tile.column_of(static_cast<T*>(data)) : nullptr;
  }
  __device__ __forceinline__ bool wants_gamma(const Call& call) const { return window == 0 && call.dgamma.slot >= 0; }
};

// A thread's sums.
template <Sums kSums> struct Totals {
  float alpha[kEvenWindow] = {}, point[kSums == kOfAlphaAndDictionary ? kEvenWindow : 1] = {}, gamma[1] = {};

  // Leaves them in the partial sums, summed over the threads of each column in the memory where the tables were, and
  // times what of_alpha(channel, k) and of_point(channel, k) say for the window's k-th point.
  template <class Share, class OfAlpha, class OfPoint>
  __device__ __forceinline__ void put(const Share& own, const Call& call, float* shared, OfAlpha of_alpha,
                                      OfPoint of_point) const {
    if (kSums != kNoSums && call.dalpha.slot >= 0)
      put(alpha, own.count, call.dalpha.slot + own.begin, own, call, shared, of_alpha);
    if constexpr (kSums == kOfAlphaAndDictionary)
      put(point, own.count, call.ddictionary.slot + own.begin, own, call, shared, of_point);
    if (own.wants_gamma(call)) put(gamma, 1, call.dgamma.slot, own, call, shared, [](int64_t, int) { return 1.0f; });
    finish<float>(own.tile, call, own.window);
  }

 private:
  template <int N, class Share, class Scale>
  __device__ __forceinline__ static void put(const float (&sums)[N], int count, int slot, const Share& own,
                                             const Call& call, float* shared, Scale scale) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < N; ++k) shared[k * kBackwardThreads + threadIdx.x] = sums[k];
    sum_over_threads(shared, count, own.tile, [&](int k, int column, float total) {
      put_partial(own.tile, call, slot + k, column, total * scale(own.tile.channel_of(column), k));
    });
  }
};

// Fewer with what a thread adds up.
template <class T, Sums kSums, bool kBase>
constexpr int kBackwardBlocks = kSums == kNoSums && !kBase ? kMostBlocks
                                : kSums == kOfAlphaAndDictionary || (kSums == kOfAlpha && kBase && kMore<T> > 1) ? 2 : 3;

// dx = g f′(x), and partial sums of the gradients of α, δ and γ.
template <class T, bool kVector, Sums kSums, bool kAnswers, bool kBase>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<T, kSums, kBase>) backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  using Own = Share<T, kVector, kSums == kNoSums ? 4 * kMore<T> : 4>;
  float* const shared = reinterpret_cast<float*>(memory);
  const Own share(call, blockIdx.x);
  const auto& tile = share.tile;
  constexpr int V = std::decay_t<decltype(tile)>::kElements;
  if (share.window == 0) Lookup<kAnswers>::template prepare<kBackwardThreads>(call, tile.channel(), shared);
  const Lookup<kAnswers> curve(call, tile.channel(), shared);
  const EvenSums even(call, curve.cells.gamma, share.window);
  const T *x = share.input(call.x), *grad = share.input(call.grad);
  T* const dx = share.output(call.dx);
  const bool want_gamma = !kAnswers && share.wants_gamma(call);
  Totals<kSums> sums;
  const auto each = [&](auto evaluate) {
    for (int i = 0; i < tile.tiles; ++i) {
      const auto place = tile.place(i);
      T raw[V];
      float at[V], g[V], out[V] = {};
      tile.fetch(x, place, raw);
      tile.load(grad, place, g);
#pragma unroll
      for (int v = 0; v < V; ++v) at[v] = curve.clamped(to_arithmetic(raw[v]));
      evaluate(raw, at, g, out);
      if (!dx) continue;
      if constexpr (kBase) add_base<1>(call, tile, place, out, x, grad);
      tile.store(dx, place, out);
    }
  };
  const auto look_up = [&](const T (&raw)[V], const float (&at)[V], const float (&g)[V], float (&out)[V]) {
    if constexpr (!kAnswers)
      if (want_gamma) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums.gamma[0] = fmaf(g[v], curve.polynomial(curve.find(at[v]), 1), sums.gamma[0]);
      }
    if (!dx) return;
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = g[v] * curve(raw[v], at[v]);
  };
  if (curve.cells.count > 0 && (kSums == kNoSums || (kSums == kOfAlpha && curve.cells.even))) {
    each([&](const T (&raw)[V], const float (&at)[V], const float (&g)[V], float (&out)[V]) {
      if constexpr (kSums == kOfAlpha) {
#pragma unroll
        for (int v = 0; v < V; ++v) even.add(at[v], g[v], sums.alpha);
      }
      look_up(raw, at, g, out);
    });
  } else {
    each([&](const T (&raw)[V], const float (&at)[V], const float (&g)[V], float (&out)[V]) {
      if constexpr (kSums != kNoSums) {
#pragma unroll
        for (int k = 0; k < kEvenWindow; ++k) {
          const int begin = share.begin + k;
          curve.at_points(at, begin, min(begin + 1, call.size), [&](int v, float d, float K, const Point&) {
            sums.alpha[k] = fmaf(g[v], K, sums.alpha[k]);
            if constexpr (kSums == kOfAlphaAndDictionary) sums.point[k] = fmaf(g[v] * K, d, sums.point[k]);
          });
        }
      }
      if (curve.cells.count > 0) return look_up(raw, at, g, out);
      if (!dx && !want_gamma) return;
      curve.at_points(at, 0, call.size, [&](int v, float d, float K, const Point& p) {
        const float term = g[v] * (p.alpha * K) * d;
        out[v] += term;
        sums.gamma[0] -= term * d;
      });
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] *= -2 * curve.cells.gamma;
    });
  }
  const Own own(call, again(blockIdx.x));
  sums.put(
      own, call, shared,
      [&](int64_t channel, int k) {
        const Cells& cells = call.tables.cells[channel];
        return kSums == kOfAlpha && cells.even ? point_scale(call, cells.gamma, own.window, k) : 1.0f;
      },
      [&](int64_t channel, int k) {
        return 2 * call.tables.cells[channel].gamma * call.tables.points[channel * call.size + own.begin + k].alpha;
      });
}

// dgrad = v_x f′(x) + q(x), dx = v_x g f″(x) + g q′(x), and partial sums as in backward. Without kAlong q is 0, as in a
// gradient penalty; with it four tables of 42 KB leave room for one block.
template <class T, bool kVector, Sums kSums, bool kWithAlong, bool kBase>
__global__ void __launch_bounds__(kBackwardThreads, kWithAlong || kSums == kOfAlphaAndDictionary ? 1 : 2)
    double_backward_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  // Eight elements with all sums of theirs are more than 255 registers.
  using Own = Share<T, kVector && !(kMore<T> > 1 && kWithAlong && kSums == kOfAlphaAndDictionary)>;
  constexpr int V = decltype(Own::tile)::kElements;
  float* const shared = reinterpret_cast<float*>(memory);
  const Own share(call, blockIdx.x);
  const auto& tile = share.tile;
  const int64_t channel = tile.channel();
  if (share.window == 0) SharedCurves::prepare<kBackwardThreads>(call, channel, shared);
  const SharedCurves curves(call, channel, shared);
  const float gamma = curves.cells.gamma, v_gamma = kWithAlong ? read<float>(call.v_gamma, channel, 0) : 0;
  const T *x = share.input(call.x), *grad = share.input(call.grad), *v_x = share.input(call.v_x);
  T *const dx = share.output(call.dx), *const dgrad = share.output(call.dgrad);
  const bool want_gamma = share.wants_gamma(call);
  const auto terms = [&](int k, float d, float K, const Point& p) {
    return second_order(d, K, gamma, p.alpha, kWithAlong ? read<float>(call.v_alpha, channel, k) : 0.0f, v_gamma,
                        kWithAlong ? read<float>(call.v_dictionary, channel, k) : 0.0f);
  };
  Totals<kSums> sums;
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
      for (int k = 0; k < kEvenWindow; ++k) {
        const int begin = share.begin + k;
        curves.at_points(at, begin, min(begin + 1, call.size), [&](int e, float d, float K, const Point& p) {
          const SecondOrder<float> s = terms(begin, d, K, p);
          sums.alpha[k] += v[e] * g[e] * s.alpha_x;
          if constexpr (kWithAlong) sums.alpha[k] += g[e] * s.alpha_v;
          if constexpr (kSums == kOfAlphaAndDictionary) sums.point[k] -= v[e] * g[e] * s.curvature;
          if constexpr (kSums == kOfAlphaAndDictionary && kWithAlong) sums.point[k] -= g[e] * s.along_slope;
        });
      }
    }
    if (!dx && !dgrad && !want_gamma) continue;
    if (curves.cells.count > 0) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const SharedCurves::Place p = curves.find(at[e]);
        const float vg = v[e] * g[e];
        out_grad[e] = v[e] * curves.polynomial(p, 0);
        out[e] = vg * curves.polynomial(p, 1);
        if constexpr (kWithAlong) out_grad[e] += curves.polynomial(p, 2), out[e] += g[e] * curves.polynomial(p, 3);
        if (!want_gamma) continue;
        sums.gamma[0] += vg * curves.polynomial(p, kWithAlong ? 4 : 2);
        if constexpr (kWithAlong) sums.gamma[0] += g[e] * curves.polynomial(p, 5);
      }
    } else {
      for (int k = 0; k < call.size; ++k)
        curves.at_points(at, k, k + 1, [&](int e, float d, float K, const Point& p) {
          const SecondOrder<float> s = terms(k, d, K, p);
          const float vg = v[e] * g[e];
          out_grad[e] += v[e] * s.slope;
          out[e] += vg * s.curvature;
          sums.gamma[0] += vg * s.gamma_x;
          if constexpr (!kWithAlong) return;
          out_grad[e] += s.along;
          out[e] += g[e] * s.along_slope;
          sums.gamma[0] += g[e] * s.gamma_v;
        });
    }
    if constexpr (kBase) {
      if (v_x && dx) add_base<2>(call, tile, place, out, x, v_x, grad);
      if (v_x && dgrad) add_base<1>(call, tile, place, out_grad, x, v_x);
    }
    if (dx) tile.store(dx, place, out);
    if (dgrad) tile.store(dgrad, place, out_grad);
  }
  const auto as_it_is = [](int64_t, int) { return 1.0f; };
  sums.put(Own(call, again(blockIdx.x)), call, shared, as_it_is, as_it_is);
}

// All of these, without tables.
template <Order order, class T, bool kVector, bool kAnyPsi>
__global__ void __launch_bounds__(kThreads, order == kBackward ? 3 : 4) direct_kernel(const Call call) {
  KAF_DYNAMIC_SHARED(memory);
  const uint32_t block = quotient(blockIdx.x, call.windows);
  const Tile<T, kVector> tile(call.tiling, block);
  direct<order, kAnyPsi>(tile, call, static_cast<int>(blockIdx.x - block * call.windows.by), memory);
}

// One warp to an output: the sum of its partial sums over blocks, over the columns of its channel, and over channels
// where they share a row.
template <class A> __global__ void __launch_bounds__(kThreads) reduce_kernel(const Call call) {
  int64_t output = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Tiling& t = call.tiling;
  for (const Gradient* g : {&call.dalpha, &call.ddictionary, &call.dgamma}) {
    const int64_t outputs = g->rows * g->size;
    if (output >= outputs) {
      output -= outputs;
      continue;
    }
    const int64_t row = output / g->size, k = output % g->size;
    const int64_t columns = g->rows == 1 ? t.columns : t.columns_per_channel.by;
    const A* partial = static_cast<const A*>(call.partial) + row * columns * call.slots + g->slot + k;
    const int64_t count = t.chunks.by * columns;
    double total = 0;
    for (int64_t i = lane; i < count; i += 32) total += partial[(i / columns * t.columns + i % columns) * call.slots];
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (lane == 0) store(*g, output, total);
    return;
  }
}

template <class T, Order order> size_t shared_bytes(const Call& call) {
  if (!call.tables.cells) return DirectShared<typename Arithmetic<T>::type, order>::bytes(call);
  const size_t sums = sizeof(float) * kEvenWindow * call.tiling.threads;
  return order == kForward ? table_bytes(call) : std::max(table_bytes(call), sums);
}
using Entry = void (*)(Call);
template <Order order, class T, bool kVector, bool kBase> Entry kernel_with_tables(const Call& call) {
  const auto with = [&](auto sums) -> Entry {
    if constexpr (kHasAnswers<T> && kVector && order != kDoubleBackward && sums != kOfAlphaAndDictionary)
      if (call.powers) {
        if constexpr (order == kForward) return forward_kernel<T, kVector, false, true, kBase>;
        else return backward_kernel<T, kVector, sums(), true, kBase>;
      }
    if constexpr (order == kForward && !kVector)
      if (!call.tiling.row_step) return forward_kernel<T, false, true, false, kBase>;
    if constexpr (order == kForward) return forward_kernel<T, kVector, false, false, kBase>;
    if constexpr (order == kBackward) return backward_kernel<T, kVector, sums(), false, kBase>;
    [[maybe_unused]] const bool along = call.v_alpha.data || call.v_gamma.data || call.v_dictionary.data;
    if constexpr (order == kDoubleBackward)
      return along ? double_backward_kernel<T, kVector, sums(), true, kBase>
                   : double_backward_kernel<T, kVector, sums(), false, kBase>;
  };
  if (call.ddictionary.slot >= 0) return with(std::integral_constant<Sums, kOfAlphaAndDictionary>());
  if (call.dalpha.slot >= 0) return with(std::integral_constant<Sums, kOfAlpha>());
  return with(std::integral_constant<Sums, kNoSums>());
}
template <Order order, class T, bool kVector> Entry kernel_of(const Call& call) {
  if constexpr (kHasTables<T>)
    if (call.tables.cells)
      return call.base ? kernel_with_tables<order, T, kVector, true>(call)
                       : kernel_with_tables<order, T, kVector, false>(call);
  if constexpr (order != kDoubleBackward)
    if (call.psi.count) return direct_kernel<order, T, kVector, true>;
  return direct_kernel<order, T, kVector, false>;
}

template <class T, Order order> int launch_of(const Call& call, Stream stream) {
  const Entry kernel = call.tiling.vectors ? kernel_of<order, T, true>(call) : kernel_of<order, T, false>(call);
  const dim3 grid(static_cast<unsigned>(blocks_of(call.tiling) * call.windows.by));
  return launch(kernel, grid, call.tiling.threads, shared_bytes<T, order>(call), stream, call);
}

}  // namespace kaf
