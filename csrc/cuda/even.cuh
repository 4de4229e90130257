// Sums of g κ(x − δ) over elements, for the points of an even dictionary: six exponentials and reciprocals for twenty.
//
// Points are taken in groups of five around an anchor. With e = (x − anchor) / Δ, t = γΔ² and r = exp(2γΔ(x − c)),
//
//     exp(−γ (x − δ)²) = E r^j e^(−t j² − 2 t a j),    E = exp(−t e²),    j = −2 … 2 the point's place in its group,
//
// a the anchor in steps from c: so that ∂α_j = e^(−t j² − 2 t a j) Σ_n g E r^j, where the sum costs a multiply-add for each
// element and point. c is near the middle of the window of twenty points, so that no power overflows where an E is not 0:
// r is within 2^±34 there, for t ≤ 0.51, as place_cells sees to, and kept within 2^±60 elsewhere. Rounding the exponent of
// E, e^(−4t) where K = 1, costs about 4t roundings of K.
//
// Napkin: 49 instructions an element, by hand; memory leaves 120 of float32's backward, 60 of half precision's.
#pragma once
#include "cells.cuh"

namespace kaf {

constexpr int kGroup = 5, kGroups = 4, kEvenWindow = kGroup * kGroups;

// a (high + low) to nearly twice the precision.
KAF_FN Split<float> times(float a, Split<float> b) {
  const float high = a * b.high;
  return {high, fmaf(a, b.low, fmaf(a, b.high, -high))};
}

// Such a product rounded once. Rounding γ shifts sums of many elements one way, where other errors average out.
KAF_FN float rounded(Split<float> product) { return product.high + product.low; }

struct EvenSums {
  float inverse_high, inverse_low;  // 1 / Δ
  float kappa;                      // 2γΔ log2 e; rounded, it stands for a γ that all of this is exact for
  float centre;                     // κ c, an integer
  float exponent, first_anchor;     // −t log2 e; in steps from the middle of the dictionary

  __device__ __forceinline__ EvenSums(const Call& call, float gamma, int window) {
    const Uniform& u = call.uniform;
    inverse_high = u.inverse_step.high, inverse_low = u.inverse_step.low;
    kappa = rounded(times(gamma, u.kappa_by_gamma));
    exponent = -0.5f * rounded(times(kappa, u.step));
    const float begin = window * kEvenWindow - 0.5f * (call.size - 1);
    first_anchor = begin + kGroup / 2;
    centre = rintf((begin + 0.5f * (kEvenWindow - 1)) * u.step.high * kappa);
  }

  // Adds g E r^j to the sum of each point, for an x as Curves::clamped has it.
  __device__ __forceinline__ void add(float x, float g, float (&sums)[kEvenWindow]) const {
    // r = 2^(κ x − centre) to a rounding or two: the product's own rounding error comes back as a factor.
    const float p = __fmul_rn(x, kappa), error = fmaf(x, kappa, -p);
    float r = exp2_approx(clamp(p - centre, -60.0f, 60.0f));
    r = fmaf(r * error, 0.69314718f, r);
    const float s = reciprocal_approx(r), rr = r * r, ss = s * s;
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const float e = fmaf(x, inverse_low, fmaf(x, inverse_high, -(first_anchor + kGroup * q)));
      const float w = g * exp2_approx(exponent * e * e);
      float* of_group = sums + kGroup * q;  // j = −2 … 2
      of_group[0] = fmaf(w, ss, of_group[0]);
      of_group[1] = fmaf(w, s, of_group[1]);
      of_group[2] += w;
      of_group[3] = fmaf(w, r, of_group[3]);
      of_group[4] = fmaf(w, rr, of_group[4]);
    }
  }
};

// What a sum of the window's k-th point has to be multiplied by.
__device__ __forceinline__ float point_scale(const Call& call, float gamma, int window, int k) {
  const EvenSums sums(call, gamma, window);
  const int j = k % kGroup - kGroup / 2;
  const float a = sums.first_anchor + k / kGroup * kGroup;
  const Split<float> z = times(-0.5f * j * (j + 2 * a), times(sums.kappa, call.uniform.step));  // the factor is exact
  return exp2_exact(z.high + j * sums.centre, z.low);
}

}  // namespace kaf
