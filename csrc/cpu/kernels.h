// One kernel κ(u) other than the Gaussian, times a power of u: what one element and one point contribute. No loops, no
// torch. All have κ(0) = 1 and κ″(0) = −2, as the Gaussian exp(−u²) does.
#pragma once
#include <cmath>

#include "../kaf_math.h"

namespace kaf {

enum Kernel : int64_t { kRationalQuadratic = 1, kMatern32 = 2, kBSpline = 3 };

// e^z for z ≤ 0, within 2 ulp, without branches or calls so that loops over it vectorise. 0 below −87.
KAF_FN float exp_negative(float z) {
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const float c = z < -87.0f ? -87.0f : z;
  const float k = c * 0x1.715476p0f + magic, n = k - magic;
  const float r = (c - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 1.0f / 5040;  // Taylor to r^7 on |r| ≤ ln 2 / 2
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits, exponent;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&exponent, &k, 4);
  bits += static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
  std::memcpy(&p, &bits, 4);
  return z < -87.0f ? 0.0f : p;
}
KAF_FN double exp_negative(double z) { return exp_double(z); }

// u^Power κ^(Order)(u). Finite u only.
template <int Which, int Power, int Order, class T> KAF_FN T kernel_term(T u) {
  static_assert(0 <= Power && Power <= Order && Order <= 2);
  T value;
  if constexpr (Which == kRationalQuadratic) {  // κ = 1/(1 + u²)
    const T t = T(1) / (T(1) + u * u);
    if constexpr (Order == 0) value = t;
    if constexpr (Order == 1) value = T(-2) * u * t * t;
    if constexpr (Order == 2) value = t * t * (T(6) - T(8) * t);
  } else if constexpr (Which == kMatern32) {  // κ = (1 + s) e^−s, s = √2 |u|
    const T s = T(1.4142135623730950488) * std::fabs(u), e = exp_negative(-s);
    if constexpr (Order == 0) value = (T(1) + s) * e;
    if constexpr (Order == 1) value = T(-2) * u * e;
    if constexpr (Order == 2) value = T(2) * (s - T(1)) * e;
  } else {  // with w = √(2/3) |u|: κ = 1 − 3/2 w² + 3/4 w³ up to 1, (2 − w)³/4 up to 2, then 0
    const T scale = T(0.81649658092772603273), w = scale * std::fabs(u), rest = w > T(2) ? T(0) : T(2) - w;
    T inner, outer;
    if constexpr (Order == 0) inner = T(1) + w * w * (T(0.75) * w - T(1.5)), outer = T(0.25) * rest * rest * rest;
    if constexpr (Order == 1) inner = w * (T(2.25) * w - T(3)), outer = T(-0.75) * rest * rest;
    if constexpr (Order == 2) inner = T(3) * w - T(2), outer = rest;
    value = w < T(1) ? inner : outer;
    if constexpr (Order == 1) value = std::copysign(scale * value, -u);
  }
  if constexpr (Power >= 1) value = value * u;
  if constexpr (Power >= 2) value = value * u;
  return value;
}

const char* instruction_set();  // the one that ops.cpp has chosen for this process

}  // namespace kaf
