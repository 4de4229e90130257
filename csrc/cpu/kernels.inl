// Curves of the kernels other than the Gaussian, and sums of data over what they are made of. All have κ(0) = 1 and
// κ″(0) = −2, as the Gaussian exp(−u²) does. With u = √γ (x − δ), as γ ∂/∂γ is (u/2) ∂/∂u,
//
//     ψ[n, m] = γ^(n/2 − m) Σ_{p ≤ m} a_p u^p κ^(n + p)(u)
//
// Every element pays for every point, but no tensor of N × D numbers exists: elements are copied to tiles that stay in
// the cache, and the loops over them are left to the compiler to vectorise.

namespace kaf {
namespace KAF_ISA {
namespace {

constexpr int kKernelTile = 512;  // elements handled at a time
constexpr int kLanes = 16;        // partial sums of a tile; divides kKernelTile

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

// κ^(Order)(u) for finite u.
template <int Which, int Order, class T> KAF_FN T kernel_derivative(T u) {
  static_assert(0 <= Order && Order <= 2);
  if constexpr (Which == kRationalQuadratic) {  // κ = 1/(1 + u²)
    const T t = T(1) / (T(1) + u * u);
    if constexpr (Order == 0) return t;
    if constexpr (Order == 1) return T(-2) * u * t * t;
    if constexpr (Order == 2) return t * t * (T(6) - T(8) * t);
  } else if constexpr (Which == kMatern32) {  // κ = (1 + s) e^−s, s = √2 |u|
    const T s = T(1.4142135623730950488) * std::fabs(u), e = exp_negative(-s);
    if constexpr (Order == 0) return (T(1) + s) * e;
    if constexpr (Order == 1) return T(-2) * u * e;
    if constexpr (Order == 2) return T(2) * (s - T(1)) * e;
  } else {  // with w = √(2/3) |u|: κ = 1 − 3/2 w² + 3/4 w³ up to 1, (2 − w)³/4 up to 2, then 0
    const T scale = T(0.81649658092772603273), w = scale * std::fabs(u), rest = w > T(2) ? T(0) : T(2) - w;
    T inner, outer;
    if constexpr (Order == 0) inner = T(1) + w * w * (T(0.75) * w - T(1.5)), outer = T(0.25) * rest * rest * rest;
    if constexpr (Order == 1) inner = w * (T(2.25) * w - T(3)), outer = T(-0.75) * rest * rest;
    if constexpr (Order == 2) inner = T(3) * w - T(2), outer = rest;
    const T value = w < T(1) ? inner : outer;
    return Order == 1 ? std::copysign(scale * value, -u) : value;
  }
}

// ψ[N, M] / γ^(N/2 − M).
template <int Which, int N, int M, class T> KAF_FN T kernel_psi(T u) {
  if constexpr (M == 0) return kernel_derivative<Which, N>(u);
  else if constexpr (N == 0 && M == 1) return T(0.5) * (u * kernel_derivative<Which, 1>(u));
  else if constexpr (N == 1 && M == 1)
    return T(0.5) * (kernel_derivative<Which, 1>(u) + u * kernel_derivative<Which, 2>(u));
  else return T(0.25) * (u * (u * kernel_derivative<Which, 2>(u) - kernel_derivative<Which, 1>(u)));
}

// Elements, |x| ≤ kFar, their weights and values.
template <class T> struct KernelTile {
  static constexpr T kFar = 1e18;  // whose square is finite
  alignas(64) T x[kKernelTile], w[kKernelTile], y[kKernelTile];

  // Returns n with padding to a multiple of kLanes. An infinite x has the weight 0, and a NaN passes its own on.
  int64_t fill(const T* from, const T* weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T at = from[i], one = weight ? weight[i] : T(1);
      w[i] = std::fabs(at) <= std::numeric_limits<T>::max() ? one : at != at ? at : T(0) * one;
      x[i] = at != at ? T(0) : at < -kFar ? -kFar : at > kFar ? kFar : at;
    }
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(x + n, x + padded, T(0));
    std::fill(w + n, w + padded, T(0));
    return padded;
  }
};

// A channel's dictionary, and the coefficients of its curve where there is one.
struct KernelPoints {
  double gamma;
  int64_t size;
  const double *points, *coefficients;
};

// Calls f(k, u_of) for each point, u_of(x) = √γ (x − δ_k) with δ_k the sum of two T.
template <class T, class F> KAF_FN void for_points(const KernelPoints& p, F f) {
  const T root = static_cast<T>(std::sqrt(p.gamma));
  for (int64_t k = 0; k < p.size; ++k) {
    const T high = static_cast<T>(p.points[k]), low = static_cast<T>(p.points[k] - high);
    f(k, [=](T x) __attribute__((always_inline)) { return root * ((x - high) - low); });
  }
}

template <class T> double total(const T (&lanes)[kLanes]) {
  double sum = 0;
  for (const T lane : lanes) sum += lane;
  return sum;
}

// y = Σ_k a_k ψ[N, M].
template <class T, int Which, int N, int M> void kernel_curve(KernelTile<T>& t, int64_t n, const KernelPoints& p) {
  for_points<T>(p, [&](int64_t k, auto u_of) __attribute__((always_inline)) {
    const T a = static_cast<T>(p.coefficients[k]);
    for (int64_t i = 0; i < n; ++i) t.y[i] += a * kernel_psi<Which, N, M>(u_of(t.x[i]));
  });
}

// sums[k] += Σ_i w_i ψ[N, M].
template <class T, int Which, int N, int M>
void kernel_sums(KernelTile<T>& t, int64_t n, const KernelPoints& p, double* sums) {
  for_points<T>(p, [&](int64_t k, auto u_of) __attribute__((always_inline)) {
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] += t.w[i + l] * kernel_psi<Which, N, M>(u_of(t.x[i + l]));
    sums[k] += total(lanes);
  });
}

// All that a backward pass of [N, M] may want, which shares most of its work: the curve of ψ[N + 1, M], and sums over
// ψ[N, M], ψ[N + 1, M] and ψ[N, M + 1], each where it is not nullptr.
template <class T, int Which, int N, int M>
void kernel_all(KernelTile<T>& t, int64_t n, const KernelPoints& p, double* sums, double* by_x, double* by_gamma) {
  for_points<T>(p, [&](int64_t k, auto u_of) __attribute__((always_inline)) {
    const T a = p.coefficients ? static_cast<T>(p.coefficients[k]) : T(0);
    T of[kLanes] = {}, of_x[kLanes] = {}, of_gamma[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) {
        const T u = u_of(t.x[i + l]), w = t.w[i + l], slope = kernel_psi<Which, N + 1, M>(u);
        t.y[i + l] += a * slope;
        of[l] += w * kernel_psi<Which, N, M>(u);
        of_x[l] += w * slope;
        of_gamma[l] += w * kernel_psi<Which, N, M + 1>(u);
      }
    if (sums) sums[k] += total(of);
    if (by_x) by_x[k] += total(of_x);
    if (by_gamma) by_gamma[k] += total(of_gamma);
  });
}

// The loops of one kernel up to the second derivatives, beyond which two of the kernels have none.
template <class T, int Which> struct KernelLoops {
  using Curve = void (*)(KernelTile<T>&, int64_t, const KernelPoints&);
  using Sums = void (*)(KernelTile<T>&, int64_t, const KernelPoints&, double*);
  using All = void (*)(KernelTile<T>&, int64_t, const KernelPoints&, double*, double*, double*);

  static void curve(Order o, KernelTile<T>& t, int64_t n, const KernelPoints& p) {
    static constexpr Curve loops[3][3] = {
        {kernel_curve<T, Which, 0, 0>, kernel_curve<T, Which, 0, 1>, kernel_curve<T, Which, 0, 2>},
        {kernel_curve<T, Which, 1, 0>, kernel_curve<T, Which, 1, 1>},
        {kernel_curve<T, Which, 2, 0>}};
    loops[o.n][o.m](t, n, p);
  }
  static void sums(Order o, KernelTile<T>& t, int64_t n, const KernelPoints& p, double* out) {
    static constexpr Sums loops[3][3] = {
        {kernel_sums<T, Which, 0, 0>, kernel_sums<T, Which, 0, 1>, kernel_sums<T, Which, 0, 2>},
        {kernel_sums<T, Which, 1, 0>, kernel_sums<T, Which, 1, 1>},
        {kernel_sums<T, Which, 2, 0>}};
    loops[o.n][o.m](t, n, p, out);
  }
  static void all(Order o, KernelTile<T>& t, int64_t n, const KernelPoints& p, double* sums, double* by_x,
                  double* by_gamma) {
    static constexpr All loops[2][2] = {{kernel_all<T, Which, 0, 0>, kernel_all<T, Which, 0, 1>},
                                        {kernel_all<T, Which, 1, 0>}};
    loops[o.n][o.m](t, n, p, sums, by_x, by_gamma);
  }
};

// ψ[n, m] of the rational quadratic, of any order: κ^(j) = (−1)^j j! Im w^(j + 1) with w = (u + i)/(1 + u²).
class RationalQuadratic {
 public:
  explicit RationalQuadratic(Order o) : order_(o) {
    a_[0] = 1;
    for (int j = 0; j < o.m; ++j)  // one more differentiation by γ
      for (int p = j + 1; p >= 0; --p) a_[p] = (0.5 * p - j) * a_[p] + (p > 0 ? 0.5 * a_[p - 1] : 0);
    for (int i = 0; i < o.n; ++i)  // and by u
      for (int p = 0; p < o.m; ++p) a_[p] += (p + 1) * a_[p + 1];
  }
  double operator()(double u) const {
    const double t = 1 / (1 + u * u), re = u * t;
    double real = re, imaginary = t, power = 1, sum = 0;  // (−1)^j j! w^(j + 1), u^p
    for (int j = 0; j <= order_.n + order_.m; ++j) {
      if (j >= order_.n) sum += a_[j - order_.n] * power * imaginary, power *= u;
      const double r = -(j + 1) * (real * re - imaginary * t);
      imaginary = -(j + 1) * (real * t + imaginary * re);
      real = r;
    }
    return sum;
  }

 private:
  Order order_;
  double a_[kHighest] = {};
};

template <class T> void kernel_curve(const RationalQuadratic& psi, KernelTile<T>& t, int64_t n, const KernelPoints& p) {
  for (int64_t i = 0; i < n; ++i) {
    double y = 0;
    for_points<double>(p, [&](int64_t k, auto u_of) { y += p.coefficients[k] * psi(u_of(t.x[i])); });
    t.y[i] = static_cast<T>(y);
  }
}

template <class T>
void kernel_sums(const RationalQuadratic& psi, KernelTile<T>& t, int64_t n, const KernelPoints& p, double* sums) {
  for_points<double>(p, [&](int64_t k, auto u_of) {
    for (int64_t i = 0; i < n; ++i) sums[k] += t.w[i] * psi(u_of(t.x[i]));
  });
}

template <class T, int Which>
void run_kernel_of(const Plan& p, KernelTile<T>& t, int64_t n, const KernelPoints& points, double* sums) {
  using Loops = KernelLoops<T, Which>;
  const auto low = [](Order o) { return o.n + o.m <= 2; };
  const bool curve = p.curves_count > 0;
  Order least = curve ? p.curve_order[0] : p.sum_order[0];
  for (int i = 0; i < p.sums_count; ++i)
    least = {std::min(least.n, p.sum_order[i].n), std::min(least.m, p.sum_order[i].m)};
  const auto is = [&](Order o, int n, int m) { return o.n == least.n + n && o.m == least.m + m; };
  if (p.curves_count + p.sums_count > 1 && least.n + least.m <= 1 && (!curve || is(p.curve_order[0], 1, 0))) {
    double *same = nullptr, *by_x = nullptr, *by_gamma = nullptr;
    for (int i = 0; i < p.sums_count; ++i)
      (is(p.sum_order[i], 0, 0) ? same : is(p.sum_order[i], 1, 0) ? by_x : by_gamma) = sums + i * points.size;
    return Loops::all(least, t, n, points, same, by_x, by_gamma);
  }
  if (curve) {
    if (low(p.curve_order[0])) Loops::curve(p.curve_order[0], t, n, points);
    else kernel_curve(RationalQuadratic(p.curve_order[0]), t, n, points);
  }
  for (int i = 0; i < p.sums_count; ++i, sums += points.size) {
    if (low(p.sum_order[i])) Loops::sums(p.sum_order[i], t, n, points, sums);
    else kernel_sums(RationalQuadratic(p.sum_order[i]), t, n, points, sums);
  }
}

// The work of one channel on n elements: out = [w] curve(x), and the plan's sums.
template <class T>
void run_kernel(const Plan& p, int64_t c, int64_t n, const T* x, const T* w, T* out, double* sums) {
  const int64_t d = p.dictionary_size, row = p.shared_basis ? 0 : c;
  const KernelPoints points{p.bases[row].gamma, d, p.points.data() + row * d,
                            p.curves_count ? p.curves.data() + c * d : nullptr};
  KernelTile<T> t;
  for (int64_t at = 0; at < n; at += kKernelTile) {
    const int64_t length = std::min<int64_t>(n - at, kKernelTile);
    const int64_t padded = t.fill(x + at, w ? w + at : nullptr, length);
    std::fill(t.y, t.y + padded, T(0));
    switch (p.kernel) {
      case kRationalQuadratic: run_kernel_of<T, kRationalQuadratic>(p, t, padded, points, sums); break;
      case kMatern32: run_kernel_of<T, kMatern32>(p, t, padded, points, sums); break;
      default: run_kernel_of<T, kBSpline>(p, t, padded, points, sums);
    }
    if (!p.products_count) continue;
    const Beneath& beneath = p.products[0].beneath;
    for (int64_t i = 0; i < length; ++i) {
      const double curve = t.y[i] * t.w[i], weight = w ? w[at + i] : T(1);
      out[at + i] = static_cast<T>(beneath.base ? curve + weight * base_at(beneath, x[at + i]) : curve);
    }
  }
}

}  // namespace
}  // namespace KAF_ISA
}  // namespace kaf
