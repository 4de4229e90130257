// The mathematics of one kernel activation function: no loops over data, no torch. Shared by every compiled backend.
//
// A curve is a sum over the points δ_k of a channel's dictionary of a polynomial times a Gaussian:
//
//     s(x) = Σ_k p_k(x − δ_k) exp(−γ (x − δ_k)²)
//
// f itself has p_k = α_k. Its derivatives in x, α, γ and δ, of every order, are curves too, of a higher degree:
//
//     ∂/∂x :  p → p′ − 2γ d p          ∂/∂γ :  p → −d² p          ∂/∂δ_k :  −∂/∂x of the k-th term
//
// so an operator that can evaluate a curve, and sum data against d^q exp(−γ d²), has every derivative of a KAF.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KAF_FN __host__ __device__ __forceinline__
#else
#define KAF_FN inline __attribute__((always_inline))
#endif

namespace kaf {

constexpr int kHighest = 12;  // order n + 2m of n derivatives in x and m in γ that is offered, the degree of their p

// p_k for one point: coefficients of d^0 … d^degree.
struct Term {
  int degree;
  double p[kHighest + 1];
};

KAF_FN double coefficient(const Term& t, int i) { return 0 <= i && i <= t.degree ? t.p[i] : 0.0; }

// The term of ∂s/∂x: q[i] = (i + 1) p[i + 1] − 2γ p[i − 1].
KAF_FN Term d_dx(const Term& t, double gamma) {
  Term r;
  r.degree = t.degree + 1;
  for (int i = 0; i <= r.degree; ++i) r.p[i] = (i + 1) * coefficient(t, i + 1) - 2 * gamma * coefficient(t, i - 1);
  return r;
}

// The term of ∂s/∂γ: q[i] = −p[i − 2].
KAF_FN Term d_dgamma(const Term& t) {
  Term r;
  r.degree = t.degree + 2;
  for (int i = 0; i <= r.degree; ++i) r.p[i] = -coefficient(t, i - 2);
  return r;
}

KAF_FN Term constant(double c) {
  Term r;
  r.degree = 0;
  r.p[0] = c;
  return r;
}

KAF_FN Term operator+(const Term& a, const Term& b) {
  Term r;
  r.degree = a.degree > b.degree ? a.degree : b.degree;
  for (int i = 0; i <= r.degree; ++i) r.p[i] = coefficient(a, i) + coefficient(b, i);
  return r;
}

KAF_FN Term operator*(double c, const Term& a) {
  Term r;
  r.degree = a.degree;
  for (int i = 0; i <= r.degree; ++i) r.p[i] = c * a.p[i];
  return r;
}

// Σ_q t.p[q] m[q]: a term's sum against data, given the data's moments m[q] = Σ_n w_n d_n^q exp(−γ d_n²).
KAF_FN double dot(const Term& t, const double* m) {
  double s = 0;
  for (int i = 0; i <= t.degree; ++i) s += t.p[i] * m[i];
  return s;
}

// What one point δ contributes at x, given d = x − δ and K = exp(−γ d²), to the second derivatives of <g, f(x)>: the
// formulas above written out, for kernels that form them for every element. v is the direction (v_α, v_γ, v_δ) of the
// second differentiation in the parameters, v_x that in x. f = α K, and q is the derivative of f along v.
template <class A> struct SecondOrder {
  A slope, curvature;     // f′, f″
  A along, along_slope;   // q, q′
  A alpha_x, alpha_v;     // ∂/∂α of f′ and of q
  A gamma_x, gamma_v;     // ∂/∂γ of f′ and of q
};
template <class A>
KAF_FN SecondOrder<A> second_order(A d, A k, A gamma, A alpha, A v_alpha, A v_gamma, A v_dictionary) {
  const A w = -2 * gamma * d, dd = d * d, f = alpha * k;             // K′ = w K
  const A m = v_gamma * -dd - v_dictionary * w;                      // along v, K changes by m K
  const A m_slope = -2 * v_gamma * d + 2 * gamma * v_dictionary;
  const A m_gamma = 2 * v_dictionary * d - dd * m;                   // ∂(m K)/∂γ = m_gamma K
  const A q = v_alpha * k + m * f;
  return {w * f, (w * w - 2 * gamma) * f, q, m_slope * f + w * q, w * k, m * k, -d * (2 + w * d) * f,
          m_gamma * f - dd * v_alpha * k};
}

// e^z in double, within 2 ulp, without branches or calls so that loops over it vectorise. 0 below −700, inf above 709.
KAF_FN double exp_double(double z) {
  const double magic = 0x1.8p52;  // adding it rounds to an integer, left in the low bits
  const double c = z < -700.0 ? -700.0 : (z > 709.0 ? 709.0 : z);
  const double k = c * 0x1.71547652b82fep0 + magic, n = k - magic;
  const double r = (c - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
  double p = 1.0 / 6227020800;  // Taylor to r^13 on |r| ≤ ln 2 / 2
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits, exponent;
  std::memcpy(&bits, &p, 8);
  std::memcpy(&exponent, &k, 8);
  bits += static_cast<int64_t>(static_cast<uint64_t>(exponent) << 52);
  double e;
  std::memcpy(&e, &bits, 8);
  e = z < -700.0 ? 0.0 : e;
  e = z > 709.0 ? e * 0x1p1023 * 2 : e;
  return z == z ? e : z;
}

// What a curve is a sum of: the codes of kafops/kernels.py.
enum Kernel : int64_t { kGaussian, kRationalQuadratic, kMatern32, kBSpline, kKernels };

// Whether a kernel may be differentiated n times in x (or the points) and m times in γ.
KAF_FN bool offers(int64_t kernel, int64_t n, int64_t m) {
  const bool smooth = kernel == kGaussian || kernel == kRationalQuadratic;
  return 0 <= n && n <= kHighest && 0 <= m && m <= kHighest && n + 2 * m <= kHighest && (smooth || n + m <= 2);
}

// What lies beneath a curve: the codes of kafops/bases.py.
enum Base : int { kNoBase, kIdentity, kRelu, kSilu, kGelu };

constexpr int kMaxOrder = 13;  // of a base's derivative

// The Eulerian numbers of n and of n − 1, which the derivatives of σ of these orders are made of.
struct Eulerian {
  double of[2][kMaxOrder];
};
KAF_FN Eulerian eulerian(int n) {
  Eulerian r = {};
  for (int i = 0; i < 2; ++i) {
    double* a = r.of[i];
    a[0] = 1;
    for (int m = 2; m <= n - i; ++m)
      for (int k = m - 1; k > 0; --k) a[k] = (k + 1) * a[k] + (m - k) * a[k - 1];
  }
  return r;
}

// σ^(n)(x), σ(x) = 1 / (1 + e^−x), given e = e^−|x| and the Eulerian numbers A of n: e (1 + e)^−(n + 1) Σ_k (−1)^k A_k e^k
// at −|x|, and the odd or even continuation of that at |x|. The sum cancels to 1/300 at n = 13, and little below.
KAF_FN double sigmoid_derivative(int n, const double* a, double x, double e) {
  const double t = 1 / (1 + e);
  if (n == 0) return x > 0 ? t : e * t;
  double y = a[n - 1], power = e * t * t;
  for (int k = n - 2; k >= 0; --k) y = a[k] - e * y, power *= t;
  return x > 0 && n % 2 == 0 ? -y * power : y * power;
}

// The n-th derivative of a base at x, 0 ≤ n ≤ kMaxOrder: its limit at ±inf, NaN for NaN, and ReLU's slope 0 at 0.
KAF_FN double base_derivative(int base, int n, double x, const Eulerian& numbers) {
  if (x != x) return x;
  if (base == kNoBase) return 0;
  if (base == kIdentity) return n == 0 ? x : n == 1;
  if (base == kRelu || std::fabs(x) > 750) return n == 0 ? (x > 0 ? x : 0) : n == 1 && x > 0;  // e^−750 is 0
  const double e = exp_double(base == kSilu ? -std::fabs(x) : -0.5 * x * x);
  // A base is max(x, 0) − |x| σ(−|x|), or with Φ, the distribution function of N(0, 1), in place of σ.
  const double tail = base == kSilu ? e / (1 + e) : n < 2 ? 0.5 * std::erfc(std::fabs(x) * 0.70710678118654752440) : 0;
  if (n == 0) return (x > 0 ? x : 0) - std::fabs(x) * tail;
  if (base == kSilu)
    return x * sigmoid_derivative(n, numbers.of[0], x, e) + n * sigmoid_derivative(n - 1, numbers.of[1], x, e);
  double before = x > 0 ? 1 - tail : tail, density = e * 0.39894228040143267794;  // Φ and φ, then their derivatives
  for (int k = 0; k < n - 1; ++k) {
    const double next = -x * density - k * (k > 0 ? before : 0);
    before = density;
    density = next;
  }
  return x * density + n * before;
}
KAF_FN double base_derivative(int base, int n, double x) {
  return base_derivative(base, n, x, base == kSilu && n > 0 ? eulerian(n) : Eulerian{});
}

}  // namespace kaf
