// Numbers: the types of tensors, and the arithmetic done on them.
#pragma once
#include <cmath>
#include <cstdint>

#include "../kaf_math.h"
#include "cuda/device.cuh"

namespace kaf {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// What arithmetic is done in.
template <class T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };

KAF_FN float to_arithmetic(float v) { return v; }
KAF_FN double to_arithmetic(double v) { return v; }
KAF_FN float to_arithmetic(bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
__device__ __forceinline__ float to_arithmetic(float16 v) { return half_to_float(v.bits); }

template <class T> __device__ __forceinline__ T from_arithmetic(typename Arithmetic<T>::type v) { return v; }
template <> __device__ __forceinline__ bfloat16 from_arithmetic<bfloat16>(float v) { return {float_to_bfloat16(v)}; }
template <> __device__ __forceinline__ float16 from_arithmetic<float16>(float v) { return {float_to_half(v)}; }

// v clamped to [low, high]; NaN stays.
template <class T> __device__ __forceinline__ T clamp(T v, T low, T high) {
  return v < low ? low : (v > high ? high : v);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ float clamp(float v, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  return v;
}
#endif

// 2^(high + low) to a rounding or two, for high + low above −126.
KAF_FN float exp2_exact(float high, float low) {
  const float n = rintf(high), f = (high - n) + low;  // |f| ≤ 1/2; the difference is exact
  float p = 1.52527338e-5f;                           // Taylor: (ln 2)^7 / 7! … 1
  p = fmaf(p, f, 1.54035304e-4f);
  p = fmaf(p, f, 1.33335581e-3f);
  p = fmaf(p, f, 9.61812911e-3f);
  p = fmaf(p, f, 5.55041087e-2f);
  p = fmaf(p, f, 2.40226507e-1f);
  p = fmaf(p, f, 6.93147181e-1f);
  return ldexpf(fmaf(p, f, 1.0f), static_cast<int>(n));
}

// exp(scale d²), with `scale` as gaussian_scale makes it of γ.
KAF_FN float gaussian_scale(float gamma) { return -gamma * 1.44269504f; }
KAF_FN double gaussian_scale(double gamma) { return -gamma; }
__device__ __forceinline__ float gaussian(float d, float scale) { return exp2_approx(scale * d * d); }
__device__ __forceinline__ double gaussian(double d, double scale) { return exp_double(scale * d * d); }

__device__ __forceinline__ float exponential(float v) { return exp2_approx(v * 1.44269504f); }
__device__ __forceinline__ double exponential(double v) { return exp_double(v); }
// 1 / v to a rounding.
__device__ __forceinline__ float reciprocal(float v) {
  const float r = reciprocal_approx(v);
  return fmaf(r, fmaf(-v, r, 1.0f), r);
}
__device__ __forceinline__ double reciprocal(double v) { return 1 / v; }

// v, which the compiler takes for another: so that what is computed of it before a loop and after it is computed twice, and
// has no registers in the loop.
KAF_FN uint32_t again(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

template <class A> KAF_FN Split<A> split(double v) {
  const A high = static_cast<A>(v);
  return {high, high - high == 0 ? static_cast<A>(v - high) : A(0)};  // an infinite v has no low part
}

}  // namespace kaf
