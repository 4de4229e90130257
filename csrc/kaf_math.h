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

}  // namespace kaf
