// From a call's parameters to tables of its curves: see cells.cuh.
#pragma once
#include "cells.cuh"

namespace kaf {

constexpr int kTableThreads = 256;

// Where the values of a curve lie on a cell, [−½, ½], and the polynomials through them. The points are Chebyshev's,
// rounded; as the polynomials are made for the rounded ones, nothing is lost.
struct Interpolation {
  static constexpr int P = kCoefficients;
  float points[P] = {-0.49039264f, -0.41573481f, -0.27778512f, -0.09754516f,
                     0.09754516f,  0.27778512f,  0.41573481f,  0.49039264f};
  double coefficients[P][P] = {};  // [m][i]: of v^m, in the polynomial that is 1 at point i and 0 at the others

  constexpr Interpolation() {
    for (int i = 0; i < P; ++i) {
      double c[P] = {1};
      for (int j = 0, degree = 0; j < P; ++j) {
        if (j == i) continue;
        const double scale = 1 / (static_cast<double>(points[i]) - points[j]);
        for (int m = ++degree; m >= 0; --m) c[m] = ((m > 0 ? c[m - 1] : 0) - points[j] * c[m]) * scale;
      }
      for (int m = 0; m < P; ++m) coefficients[m][i] = c[m];
    }
  }
};
static __device__ const Interpolation kInterpolation;

// The step of an even dictionary.
KAF_FN double step_of(const Call& call) { return call.size > 1 ? 2 * call.boundary / (call.size - 1) : 1; }

// Cells for points from `first` to `last`, where there is room for them; and whether sums may be formed by powers.
__device__ __forceinline__ Cells place_cells(const Call& call, double first, double last, double gamma) {
  Cells c{};
  c.low = -1e18f, c.high = 1e18f;
  c.gamma = static_cast<float>(gamma);
  const double root = sqrt(gamma), span = last - first, reach = 4.4721360 / root;  // e^-20: 2e-9
  const double low = first - reach, high = last + reach;
  if (!(gamma > 0) || !(high - low < INFINITY)) return c;
  // In cells much wider than the distances that matter, d² would be lost against the error of interpolation.
  double width = 0.52 / root;
  if (span > 0) width = min(max(span, width / 16), width);
  width = max(width, min((high - low) / (call.tables.capacity - 3.1), 1.12 * width));
  if (!(width > 1e-30 && width < 1e30)) return c;
  c.width = __uint_as_float((__float_as_uint(static_cast<float>(width)) + 0xfff) & 0xfffff000);
  const double number = ceil(low / c.width - 0.5), end = floor(high / c.width + 0.5) + 2;
  if (!(fabs(number) < 4096 && fabs(end) < 4096 && end - number <= call.tables.capacity)) return c;
  c.inverse = 1 / c.width;
  // Numbers of bfloat16, so that one clamped to them is another: see answers.cuh.
  const auto outward = [](double v, double margin) {
    return __uint_as_float(__float_as_uint(static_cast<float>(v + margin * fabs(v))) & 0xffff0000);
  };
  c.low = outward(first - kGroupReach / root, -1.0 / 64);
  c.high = outward(last + kGroupReach / root, 1.0 / 64);
  c.first = static_cast<int>(number);
  c.count = static_cast<int>(end - number);
  const double t = gamma * step_of(call) * step_of(call);
  c.even = !call.dictionary.data && call.size > 1 && t >= 1.0 / 1024 && t <= 0.51;
  return c;
}

// One point's part of a curve.
__device__ __forceinline__ float term_of(Curve curve, float d, float k, float gamma, float alpha, float v_alpha,
                                         float v_gamma, float v_dictionary) {
  const SecondOrder<float> s = second_order(d, k, gamma, alpha, v_alpha, v_gamma, v_dictionary);
  switch (curve) {
    case kValue: return alpha * k;
    case kSlope: return s.slope;
    case kCurvature: return s.curvature;
    case kAlong: return s.along;
    case kAlongSlope: return s.along_slope;
    case kByGamma: return -d * d * (alpha * k);
    case kSlopeByGamma: return s.gamma_x;
    default: return s.gamma_v;
  }
}

// One block to a table: eight lanes to a cell, first one to each of its points, then to each coefficient.
static __global__ void __launch_bounds__(kTableThreads) table_kernel(const Call call) {
  __shared__ float high[kTablePoints], low[kTablePoints], alpha[kTablePoints];
  __shared__ float v_alpha[kTablePoints], v_dictionary[kTablePoints];
  const Tables& t = call.tables;
  const int64_t channel = blockIdx.x / t.count;
  const int which = static_cast<int>(blockIdx.x % t.count), lane = threadIdx.x % 32, i = lane % kCoefficients;
  const Curve curve = t.curves[which];
  const float gamma = read<float>(call.gamma, channel, 0), v_gamma = read<float>(call.v_gamma, channel, 0);
  bool bad = false;
  for (int k = threadIdx.x; k < call.size; k += kTableThreads) {
    const Split<float> delta = point<float>(call, channel, k);
    high[k] = delta.high;
    low[k] = delta.low;
    alpha[k] = read<float>(call.alpha, channel, k);
    v_alpha[k] = read<float>(call.v_alpha, channel, k);
    v_dictionary[k] = read<float>(call.v_dictionary, channel, k);
    if (which == 0) t.points[channel * call.size + k] = {high[k], low[k], alpha[k], 0};
    bad |= (delta.high + alpha[k] + v_alpha[k] + v_dictionary[k] + v_gamma) * 0 != 0;
  }
  bad = __syncthreads_or(bad);
  float first = INFINITY, last = -INFINITY;
  for (int k = lane; k < call.size; k += 32) first = min(first, high[k]), last = max(last, high[k]);
  for (int offset = 16; offset > 0; offset /= 2) {
    first = min(first, __shfl_xor_sync(0xffffffffu, first, offset));
    last = max(last, __shfl_xor_sync(0xffffffffu, last, offset));
  }
  const Cells cells = place_cells(call, bad ? NAN : first, last, read<double>(call.gamma, channel, 0));
  if (threadIdx.x == 0 && which == 0) t.cells[channel] = cells;
  if (call.finishes && which == 0)  // there are no more sets of columns than channels
    for (uint32_t i = threadIdx.x; i < call.windows.by; i += kTableThreads)
      call.counters[channel * call.windows.by + i] = 0;

  const float scale = gaussian_scale(gamma), reach = 4.4721360f / sqrtf(gamma) + cells.width / 2;
  float* rows = t.rows + (channel * t.count + which) * t.capacity * kCoefficients;
  for (int begin = 0; begin < cells.count * kCoefficients; begin += kTableThreads) {
    const int n = begin + threadIdx.x, cell = n / kCoefficients;
    const float centre = static_cast<float>(cells.first + cell) * cells.width;
    float value = 0;
    for (int k = 0; k < call.size && cell < cells.count - 1; ++k) {
      const float from_centre = (centre - high[k]) - low[k];
      if (fabsf(from_centre) > reach) continue;
      const float d = fmaf(kInterpolation.points[i], cells.width, from_centre);
      value += term_of(curve, d, exp2_exact(scale * d * d, 0), gamma, alpha[k], v_alpha[k], v_gamma, v_dictionary[k]);
    }
    double coefficient = 0;
    for (int j = 0; j < kCoefficients; ++j)
      coefficient += kInterpolation.coefficients[i][j] * __shfl_sync(0xffffffffu, value, lane - i + j);
    if (cell < cells.count) rows[n] = static_cast<float>(coefficient);
  }
}

}  // namespace kaf
