// Cells: where they lie, the tables of curves on them, and the way back from sums on them to moments. See plan.h.

namespace kaf {
namespace KAF_ISA {

template <class T> struct Precision;
template <> struct Precision<float> {
  static constexpr int kPoints = 8;           // Chebyshev points and polynomial coefficients of a cell
  static constexpr bool kMonomials = true;    // polynomials in v^m, made in double; else in T_m(v)
  static constexpr double kTail = 20;         // a Gaussian below e^-kTail is 0
  static constexpr double kWidth = 0.52;      // of a cell, times sqrt(gamma): interpolation error 2e-8
  static constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  static constexpr int kMaxCells = 4096;
  using Int = int32_t;
};
template <> struct Precision<double> {
  static constexpr int kPoints = 16;
  static constexpr bool kMonomials = false;   // their coefficients would cost four digits
  static constexpr double kTail = 41;
  static constexpr double kWidth = 0.65;      // interpolation error 3e-17
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kMaxCells = 8192;
  using Int = int64_t;
};

constexpr int kPermuteCells = 32;  // tables of as many cells are looked up with permutes, where V has them

// A double for each Chebyshev point or coefficient of a cell.
template <int P> struct VectorOf {
  typedef double type __attribute__((vector_size(P * sizeof(double))));
};
template <int P> using Vector = typename VectorOf<P>::type;
template <int P> inline __attribute__((always_inline)) Vector<P> load_vector(const double* p) {
  Vector<P> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The polynomials p_m, m = 0 … P − 1, that curves are written in on a cell: v^m or the Chebyshev polynomials T_m(v).
template <class T> struct Polynomials {
  static constexpr int P = Precision<T>::kPoints;
  static constexpr bool kMonomials = Precision<T>::kMonomials;

  // Σ_m c_m p_m(v), by Horner's or Clenshaw's scheme.
  static T sum(const T* c, T v) {
    T y = c[P - 1], after = 0;
    for (int m = P - 2; m >= 0; --m) {
      const T next = kMonomials ? y * v + c[m] : (m ? 2 * v : v) * y - after + c[m];
      after = y;
      y = next;
    }
    return y;
  }
  // out[m] = w p_m(v).
  static void weighted(T w, T v, T* out) {
    out[0] = w;
    out[1] = w * v;
    for (int m = 2; m < P; ++m) out[m] = kMonomials ? out[m - 1] * v : 2 * v * out[m - 1] - out[m - 2];
  }
};

// From values at the Chebyshev points of [-1, 1] to coefficients of p_m: Σ_i coefficients_of[i] value_i. And the transpose.
template <class T> struct Interpolation {
  static constexpr int P = Precision<T>::kPoints;
  Vector<P> points, coefficients_of[P], values_of[P];
  Interpolation() {
    const long double pi = 3.141592653589793238462643383279502884L;
    long double t[P][P] = {};  // t[n][m]: coefficient of p_m in T_n
    for (int n = 0; n < P; ++n) {
      if (!Precision<T>::kMonomials || n < 2) t[n][n] = 1;
      else for (int m = 0; m < P; ++m) t[n][m] = (m > 0 ? 2 * t[n - 1][m - 1] : 0) - t[n - 2][m];
    }
    for (int i = 0; i < P; ++i) {
      const long double angle = pi * (i + 0.5L) / P;
      points[i] = static_cast<double>(std::cos(angle));
      for (int m = 0; m < P; ++m) {
        long double sum = 0;
        for (int n = 0; n < P; ++n) sum += (n ? 2.0L : 1.0L) / P * std::cos(n * angle) * t[n][m];
        coefficients_of[i][m] = values_of[m][i] = static_cast<double>(sum);
      }
    }
  }
};
template <class T> const Interpolation<T>& interpolation() {
  static const Interpolation<T> it;
  return it;
}

// Rounds up to 12 significant bits.
inline double round_up(double w) {
  int e;
  const double m = std::frexp(w, &e);
  return std::ldexp(std::ceil(m * 4096) / 4096, e);
}

template <class T> void place_cells(Basis& b, bool permutes) {
  using Pr = Precision<T>;
  b.cells = Cells{};
  const double reach = std::sqrt(Pr::kTail / b.gamma);
  const double low = b.points.front() - reach, high = b.points.back() + reach;
  if (!(b.gamma > 0) || !std::isfinite(high - low)) return;
  double width = Pr::kWidth / std::sqrt(b.gamma);
  // In cells much wider than the distances that matter, d² is lost against the error of interpolation.
  const double span = b.points.back() - b.points.front();
  if (span > 0) width = std::clamp(span, width / 16, width);
  const bool fits = permutes && (high - low) < width * 1.12 * (kPermuteCells - 3.1);
  if (fits) width = (high - low) / (kPermuteCells - 3.1);
  // Normal numbers only, and cell numbers small enough that i · width is exact in T.
  if (!(width > 1e-30 && width < 1e30 && (high - low) / width < Pr::kMaxCells - 4)) return;
  width = round_up(width);
  const double first = std::ceil(low / width - 0.5) - 1, last = std::floor(high / width + 0.5) + 1;
  if (std::max(std::abs(first), std::abs(last)) >= Pr::kMaxCells) return;
  b.cells = Cells{width, static_cast<int64_t>(first), static_cast<int>(last - first) + 1};
  if (fits && b.cells.count <= kPermuteCells) b.cells.count = kPermuteCells;
}

template <class T> void fill_values(Basis& b) {
  constexpr int P = Precision<T>::kPoints;
  const auto& it = interpolation<T>();
  const int count = b.cells.count, d = static_cast<int>(b.points.size());
  const double half = b.cells.width / 2, reach = std::sqrt(Precision<T>::kTail / b.gamma) + half;
  b.begin.assign(count, 0);
  b.end.assign(count, 0);
  size_t total = 0;
  for (int j = 1, lo = 0, hi = 0; j < count - 1; ++j) {
    const double centre = (b.cells.first + j) * b.cells.width;
    while (lo < d && b.points[lo] < centre - reach) ++lo;
    while (hi < d && b.points[hi] <= centre + reach) ++hi;
    b.begin[j] = lo;
    b.end[j] = std::max(lo, hi);
    total += b.end[j] - b.begin[j];
  }
  b.values.resize(total * P);
  double* values = b.values.data();
  const double gamma = b.gamma;
  for (int j = 0; j < count; ++j) {
    const double centre = (b.cells.first + j) * b.cells.width;
    for (int k = b.begin[j]; k < b.end[j]; ++k, values += P) {
      const Vector<P> x = (centre - b.points[k]) + it.points * half, z = -gamma * x * x;
      for (int i = 0; i < P; ++i) values[i] = exp_double(z[i]);
    }
  }
}

inline void sort_points(Basis& b, const double* dictionary, int64_t d) {
  b.order.resize(d);
  for (int64_t k = 0; k < d; ++k) b.order[k] = static_cast<int>(k);
  std::sort(b.order.begin(), b.order.end(), [&](int i, int j) { return dictionary[i] < dictionary[j]; });
  b.points.resize(d);
  for (int64_t k = 0; k < d; ++k) b.points[k] = dictionary[b.order[k]];
}

#ifdef KAF_SCALAR
constexpr bool kScalar = true, kPermutes = false;
#else
constexpr bool kScalar = false, kPermutes = V::kPermutes;
#endif

template <class T> void make_bases_of(Plan& p, int64_t begin, int64_t end) {
  const int64_t d = p.dictionary_size;
  for (int64_t row = begin; row < end; ++row) {
    Basis& b = p.bases[row];
    const double* dictionary = p.dictionary.data() + row * d;
    b.gamma = p.gamma[row];
    if (!std::all_of(dictionary, dictionary + d, [](double v) { return std::isfinite(v); })) continue;
    sort_points(b, dictionary, d);
    place_cells<T>(b, kPermutes && std::is_same_v<T, float>);
    if (b.cells.count == 0) continue;
    // A table pays only from some number of elements on: operations to make and contract it against summing directly.
    constexpr int P = Precision<T>::kPoints;
    const double window = std::min<double>(d, 1 + (2 * std::sqrt(Precision<T>::kTail / b.gamma) + b.cells.width) *
                                                      std::max<int64_t>(d - 1, 1) /
                                                      std::max(b.points.back() - b.points.front(), 1e-300));
    const int uses = p.curves_count + p.sums_count;
    const double make = b.cells.count * P * (window * (uses + (p.shared_basis ? 0 : 12)) + P * uses);
    const double direct = static_cast<double>(p.positions) * d * 14;
    if (direct < make) b.cells.count = 0;
    else if (p.shared_basis) fill_values<T>(b);
  }
}

// Coefficients of one curve on every cell: rows [count][P], or columns [P][32] with cell i in column i mod 32.
template <class T, int Degree>
void fit(const Basis& b, const double* values, const Term* terms, bool columns, T* table) {
  constexpr int P = Precision<T>::kPoints;
  const auto& it = interpolation<T>();
  const double half = b.cells.width / 2;
  for (int j = 0; j < b.cells.count; ++j) {
    Vector<P> at{}, coefficients{};
    const double centre = (b.cells.first + j) * b.cells.width;
    for (int k = b.begin[j]; k < b.end[j]; ++k, values += P) {
      const double* t = terms[b.order[k]].p;
      const Vector<P> d = (centre - b.points[k]) + it.points * half;
      Vector<P> poly = Vector<P>{} + t[Degree];
      for (int q = Degree - 1; q >= 0; --q) poly = poly * d + t[q];
      at += poly * load_vector<P>(values);
    }
    for (int i = 0; i < P; ++i) coefficients += it.coefficients_of[i] * at[i];
    const int column = static_cast<int>((b.cells.first + j) & (kPermuteCells - 1));
    for (int m = 0; m < P; ++m)
      (columns ? table[m * kPermuteCells + column] : table[j * P + m]) = static_cast<T>(coefficients[m]);
  }
}

inline bool finite(const Term* terms, int64_t d) {
  double sum = 0;
  for (int64_t k = 0; k < d; ++k)
    for (double c : terms[k].p) sum += c * 0.0;
  return sum == 0;
}

// The basis of a channel with its values: the shared one, or this channel's made in `own`.
template <class T> const Basis& basis_with_values(const Plan& p, int64_t c, Basis& own) {
  const Basis& b = p.bases[p.shared_basis ? 0 : c];
  if (p.shared_basis || b.cells.count == 0) return b;
  own = b;
  fill_values<T>(own);
  return own;
}

// Whether run_columns can do it: otherwise channels are handled as strided rows.
inline bool columns_fit(const Plan& p) {
  if (kScalar || p.float64 || !p.channels_inner || p.channels % 16 || !p.shared_basis) return false;
  if (p.bases[0].cells.count == 0 || p.bases[0].cells.count > 128) return false;
  for (const View* v : {&p.x, &p.grad, &p.grad_x, &p.outputs[0], &p.outputs[1]})
    if (*v && v->channel_stride != 1) return false;
  return true;
}

template <class T> void make_tables_of(Plan& p, int64_t begin, int64_t end) {
  constexpr int P = Precision<T>::kPoints;
  const int64_t d = p.dictionary_size;
  Basis own;
  for (int64_t c = begin; c < end; ++c) {
    const Basis& b = basis_with_values<T>(p, c, own);
    const int64_t size = static_cast<int64_t>(b.cells.count) * P;
    if (size == 0) continue;
    const bool columns = kPermutes && std::is_same_v<T, float> && b.cells.count == kPermuteCells;
    for (int u = 0; u < p.curves_count; ++u) {
      T* table = reinterpret_cast<T*>(p.tables.get()) + p.table_offset[c] + u * size;
      const Term* terms = p.curves.data() + (u * p.channels + c) * d;
      if (!finite(terms, d)) {
        std::fill(table, table + size, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      switch (p.curve_degree[u]) {
        case 0: fit<T, 0>(b, b.values.data(), terms, columns, table); break;
        case 1: fit<T, 1>(b, b.values.data(), terms, columns, table); break;
        case 2: fit<T, 2>(b, b.values.data(), terms, columns, table); break;
        case 3: fit<T, 3>(b, b.values.data(), terms, columns, table); break;
        default: fit<T, 4>(b, b.values.data(), terms, columns, table);
      }
    }
  }
}

// moments[k][q] += Σ_cells Σ_i s_i d_i^q values_i, with s the cell's sums taken to its Chebyshev points.
template <class T> void contract_cells(const Basis& b, const double* sums, int degree, double* moments) {
  constexpr int P = Precision<T>::kPoints;
  const auto& it = interpolation<T>();
  const double half = b.cells.width / 2, *values = b.values.data();
  std::vector<double> acc(b.points.size() * (degree + 1) * P);
  for (int j = 0; j < b.cells.count; ++j, sums += P) {
    Vector<P> s{};
    for (int m = 0; m < P; ++m) s += it.values_of[m] * sums[m];
    const double centre = (b.cells.first + j) * b.cells.width;
    for (int k = b.begin[j]; k < b.end[j]; ++k, values += P) {
      const Vector<P> d = (centre - b.points[k]) + it.points * half;
      Vector<P> term = s * load_vector<P>(values);
      double* a = acc.data() + static_cast<size_t>(k) * (degree + 1) * P;
      for (int q = 0; q <= degree; ++q, a += P, term *= d) {
        const Vector<P> sum = load_vector<P>(a) + term;
        std::memcpy(a, &sum, sizeof sum);
      }
    }
  }
  for (size_t k = 0; k < b.points.size(); ++k)
    for (int q = 0; q <= degree; ++q) {
      double sum = 0;
      for (int i = 0; i < P; ++i) sum += acc[(k * (degree + 1) + q) * P + i];
      moments[b.order[k] * (kMaxDegree + 1) + q] = sum;
    }
}

}  // namespace KAF_ISA
}  // namespace kaf
