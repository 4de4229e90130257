// What a point contributes to a curve and to its gradients: ψ[n, m](x − δ), and its derivatives in x and γ.
//
// The Gaussian itself has one exponential for all three. Any other kernel or derivative goes up from κ to κ^(n + m + 1) by
// recurrence: some 10 instructions a step, for each element and point.
#pragma once
#include "arithmetic.cuh"

namespace kaf {

enum Factor { kOfHere, kOfByX, kOfByGamma, kOne };  // of a channel, that its values are multiplied by after they are summed

template <class A> struct PsiValues {
  A here, by_x, by_gamma;  // but for the factors
};

template <bool kAnyPsi, class A> struct Kappa;

template <class A> struct Kappa<false, A> {
  A gamma, scale;

  __device__ __forceinline__ Kappa(const Call&, double of_channel)
      : gamma(static_cast<A>(of_channel)), scale(gaussian_scale(gamma)) {}
  __device__ __forceinline__ PsiValues<A> operator()(A d) const {
    const A K = gaussian(d, scale);
    d = K == 0 ? A(0) : d;  // an infinite distance times 0
    return {K, K * d, K * d * d};
  }
  __device__ __forceinline__ A scaled(Factor factor, A v) const {
    return factor == kOfByX ? -2 * gamma * v : factor == kOfByGamma ? -v : v;
  }
};

// use(p, κ^(begin + p)(u)) for p = 0 … count − 1; u is finite or NaN.
template <class A, class Use>
__device__ __forceinline__ void derivatives(int kernel, A u, int begin, int count, Use use) {
  const int end = begin + count;
  if (kernel == kGaussian) {  // κ^(k + 1) = −2 (u κ^(k) + k κ^(k − 1))
    A before = 0, here = exponential(-u * u);
    for (int k = 0; k < end; ++k) {
      if (k >= begin) use(k - begin, here);
      const A next = -2 * (u * here + k * before);
      before = here, here = next;
    }
  } else if (kernel == kRationalQuadratic) {  // (−1)^k k! Im w^(k + 1), w = (u + i) / (1 + u²)
    const A t = reciprocal(1 + u * u), re = u * t;
    A real = re, imaginary = t;
    for (int k = 0; k < end; ++k) {
      if (k >= begin) use(k - begin, imaginary);
      const A factor = -(k + 1), next = factor * (real * re - imaginary * t);
      imaginary = factor * (real * t + imaginary * re), real = next;
    }
  } else if (kernel == kMatern32) {  // (1 + s) e^−s, s = √2 |u|
    const A s = A(1.4142135623730950488) * fabs(u), e = exponential(-s);
    for (int k = begin; k < end; ++k)
      use(k - begin, (k == 0 ? 1 + s : k == 1 ? -2 * u : 2 * (s - 1)) * e);
  } else {  // with w = √(2/3) |u|: 1 − 3/2 w² + 3/4 w³ up to 1, (2 − w)³/4 up to 2, then 0
    const A scale = A(0.81649658092772603273), w = scale * fabs(u), rest = w > 2 ? A(0) : 2 - w;
    const bool inner = w < 1;
    for (int k = begin; k < end; ++k) {
      if (k == 0) use(k - begin, inner ? 1 + w * w * (A(0.75) * w - A(1.5)) : A(0.25) * rest * rest * rest);
      if (k == 1) {
        const A slope = scale * (inner ? w * (A(2.25) * w - 3) : A(-0.75) * rest * rest);
        use(k - begin, u < 0 ? -slope : slope);
      }
      if (k == 2) use(k - begin, inner ? 3 * w - 2 : rest);
    }
  }
}

template <class A> struct Kappa<true, A> {
  const Psi& psi;
  double gamma, root;

  __device__ __forceinline__ Kappa(const Call& call, double of_channel)
      : psi(call.psi), gamma(of_channel), root(sqrt(of_channel)) {}

  __device__ __forceinline__ PsiValues<A> operator()(A d) const {
    PsiValues<A> r{};
    if (fabs(d) > A(5e17)) return r;  // x is infinite, or as good as that
    // Farther out, all kernels are 0 to rounding, and powers of u would overflow.
    constexpr A kFar = sizeof(A) == 4 ? 1e5 : 1e9;
    A power = 1, lower = 0;  // u^p and u^(p − 1)
    const A u = clamp(static_cast<A>(root) * d, -kFar, kFar);
    derivatives(psi.kernel, u, psi.n, psi.count, [&](int p, A value) {
      r.here += psi.a[0][p] * power * value;
      r.by_x += psi.a[1][p] * lower * value;
      r.by_gamma += psi.a[2][p] * power * value;
      lower = power;
      power *= u;
    });
    return r;
  }
  __device__ __forceinline__ A scaled(Factor factor, A v) const {
    if (factor == kOne) return v;
    const int n = psi.n + (factor == kOfByX), twice = n - 2 * (psi.m + (factor == kOfByGamma));
    double scale = 1;
    for (int i = 0; i < (twice < 0 ? -twice : twice); ++i) scale *= root;
    return static_cast<A>(v * (twice < 0 ? 1 / scale : scale));
  }
};

}  // namespace kaf
