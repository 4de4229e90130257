// The base beneath a curve, where it has one: one more term for each element.
//
// Napkin: SiLU and GELU cost some 25 instructions an element in float32, where the memory leaves 80 and cells take 33, and
// 10 and 20 in half precision, whose own rounding leaves room for quick exponentials.
#pragma once
#include "tiles.cuh"

namespace kaf {

// e^−a for 0 ≤ a ≤ 150, 0 from 104 on: to a rounding or two, or quickly.
template <bool kQuick> __device__ __forceinline__ float exp_negative(float a) {
  const float high = a * -1.44269504f;
  if (kQuick) return exp2_approx(high);
  return exp2_exact(high, fmaf(a, -1.44269504f, -high) + a * -1.92596299e-8f);
}

// The derivative of some order, at most 2, of a base at x. At ±inf it is its limit; ReLU's slope at 0 is 0.
template <Base kBase, int kOrder, bool kQuick> __device__ __forceinline__ float base_at(float x) {
  static_assert(0 <= kOrder && kOrder <= 2);
  const float above = x > 0 ? x : 0;
  if constexpr (kBase == kIdentity) return kOrder == 0 ? x : kOrder == 1;
  if constexpr (kBase == kRelu) return kOrder == 0 ? above : kOrder == 1 && x > 0;
  const float size = fabsf(x), a = size < 150 ? size : 150.0f;  // where the tails are 0; of NaN too, as the curve has it
  if constexpr (kBase == kSilu) {
    const float e = exp_negative<kQuick>(a), t = kQuick ? reciprocal_approx(1 + e) : reciprocal(1 + e);
    const float s = e * t;  // σ(−|x|) and t = σ(|x|); σ′ = s t
    if constexpr (kOrder == 0) return fmaf(-a, s, above);
    if constexpr (kOrder == 1) return x > 0 ? fmaf(a * s, t, t) : fmaf(-a * s, t, s);
    return s * t * fmaf(a, s - t, 2.0f);
  }
  const float density = kOrder > 0 ? 0.39894228f * exp_negative<kQuick>(min(0.5f * a * a, 150.0f)) : 0.0f;
  if constexpr (kOrder == 2) return density * (2 - a * a);
  const float tail = 0.5f - 0.5f * erff(a * 0.70710678f);  // Φ(−|x|)
  if constexpr (kOrder == 0) return fmaf(-a, tail, above);
  return x > 0 ? fmaf(a, density, 1 - tail) : fmaf(-a, density, tail);
}

constexpr int kAnyOrder = -1;  // that which the call says, up to kMaxOrder

// out += weights · base^(kOrder)(x) for the elements of a place. x and the weights, pointers or none, are loaded again:
// they are in the L1 cache, and had they been kept, what comes before would have fewer registers.
template <int kOrder, class Tile, int V, class... Weights>
__device__ __forceinline__ void add_base(const Call& call, const Tile& tile, const typename Tile::Place& place,
                                         typename Tile::A (&out)[V], const typename Tile::Type* x, Weights... weights) {
  using A = typename Tile::A;
  if (call.base == kNoBase) return;
  if constexpr (kOrder == kAnyOrder && std::is_same_v<A, float>) {
    if (call.base_order == 0) return add_base<0>(call, tile, place, out, x, weights...);
    if (call.base_order == 1) return add_base<1>(call, tile, place, out, x, weights...);
    if (call.base_order == 2) return add_base<2>(call, tile, place, out, x, weights...);
  }
  using T = typename Tile::Type;
  constexpr int kTensors = 1 + sizeof...(Weights);
  const T* const columns[kTensors] = {x, weights...};
  T raw[kTensors][V];  // half precision stays two to a register
#pragma unroll
  for (int i = 0; i < kTensors; ++i) tile.fetch(columns[i] + again(0), place, raw[i]);
  const auto add = [&](auto value) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A product = value(to_arithmetic(raw[0][v]));
#pragma unroll
      for (int i = 1; i < kTensors; ++i) product *= to_arithmetic(raw[i][v]);
      out[v] += product;
    }
  };
  if constexpr (kOrder == kAnyOrder) {
    add([&](double x) { return static_cast<A>(base_derivative(call.base, call.base_order, x, call.eulerian)); });
  } else if constexpr (std::is_same_v<A, double>) {
    add([&](double x) { return base_derivative(call.base, kOrder, x); });
  } else {
    constexpr bool kQuick = sizeof(T) == 2;
    switch (call.base) {
      case kIdentity: return add([](float x) { return base_at<kIdentity, kOrder, kQuick>(x); });
      case kRelu: return add([](float x) { return base_at<kRelu, kOrder, kQuick>(x); });
      case kSilu: return add([](float x) { return base_at<kSilu, kOrder, kQuick>(x); });
      default: return add([](float x) { return base_at<kGelu, kOrder, kQuick>(x); });
    }
  }
}

}  // namespace kaf
