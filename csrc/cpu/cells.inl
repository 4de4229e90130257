// Cells: where they lie, the tables of curves on them, and the way back from sums on them to moments. See plan.h.

namespace kaf {
namespace KAF_ISA {
namespace {

template <class T> struct Precision;
template <> struct Precision<float> {
  static constexpr int kPoints = 8;           // Chebyshev points and polynomial coefficients of a cell
  static constexpr bool kMonomials = true;    // polynomials in v^m, made in double; else in T_m(v)
  static constexpr double kWidth = 0.52;      // of a cell, times sqrt(gamma): interpolation error 2e-8
  static constexpr int kSteps = 32;           // cells whose Gaussians follow from one another's
  static constexpr int kFilling = 3;          // operations for one of those at one point
  static constexpr double kTail = 20;         // a Gaussian below e^-kTail is 0
  static constexpr double kHighTail[] = {23.6, 1.28};  // and one of order N > 4 below e^-([0] + [1] (N - 4))
  static constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  static constexpr int kMaxCells = 4096;
  using Int = int32_t;
};
template <> struct Precision<double> {
  static constexpr int kPoints = 16;
  static constexpr bool kMonomials = false;   // their coefficients would cost four digits
  static constexpr double kWidth = 0.65;      // interpolation error 3e-17
  static constexpr int kSteps = 1, kFilling = 8;
  static constexpr double kTail = 41;
  static constexpr double kHighTail[] = {45.1, 1.53};
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kMaxCells = 8192;
  using Int = int64_t;
};

constexpr int kColumns = 32, kMostColumns = 512;  // channels of a block where they are innermost in memory
constexpr int kPermuteCells = 32;  // tables of as many cells are looked up with permutes, where V has them

#ifdef KAF_SCALAR
constexpr bool kScalar = true, kPermutes = false;
constexpr int kFloats = 1, kDoubles = 2;  // in a register, as loops use it
#else
constexpr bool kScalar = false, kPermutes = V::kPermutes;
constexpr int kFloats = V::kWidth, kDoubles = V::kWidth / 2;
#endif

// A double for each Chebyshev point or coefficient of a cell, in registers.
template <int P> struct Vector {
  typedef double Part __attribute__((vector_size(kDoubles * sizeof(double))));
  static constexpr int kParts = P / kDoubles;
  Part part[kParts];

  KAF_FN static Vector all(double a) {
    Vector v;
    KAF_UNROLL
    for (int i = 0; i < kParts; ++i) v.part[i] = a - Part{};
    return v;
  }
  KAF_FN static Vector load(const double* p) {
    Vector v;
    KAF_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(&v.part[i], p + i * kDoubles, sizeof(Part));
    return v;
  }
  KAF_FN void store(double* p) const {
    KAF_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(p + i * kDoubles, &part[i], sizeof(Part));
  }
  KAF_FN friend Vector operator+(Vector a, Vector b) {
    KAF_UNROLL
    for (int i = 0; i < kParts; ++i) a.part[i] += b.part[i];
    return a;
  }
  KAF_FN friend Vector operator*(Vector a, Vector b) {
    KAF_UNROLL
    for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
    return a;
  }
  KAF_FN double sum() const {
    Part total = part[0];
    KAF_UNROLL
    for (int i = 1; i < kParts; ++i) total += part[i];
    double sums[kDoubles];
    std::memcpy(sums, &total, sizeof total);
    for (int n = kDoubles / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
    return sums[0];
  }
};

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

// From values at the Chebyshev points of [-1, 1] to coefficients of p_m: Σ_i coefficients_of[i] value_i. And the
// transpose.
template <class T> struct Interpolation {
  static constexpr int P = Precision<T>::kPoints;
  double points[P], coefficients_of[P][P], values_of[P][P];
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

// The widest cells on which a smooth base's derivative is a polynomial to half a rounding of its peak.
inline double base_width(int order) { return 0.6 / (1 + order / 12.0); }

// Whether tables hold a base's derivative. Not a base itself, order 0, as a sum of Chebyshev polynomials: near 0 it is
// small, and such a sum is exact to the size of its terms only.
template <class T> bool held(const Beneath& b) { return b.smooth() && (b.order > 0 || Precision<T>::kMonomials); }

// Tables of a smooth base itself, order 0, hold what is left of it without a ramp that the loops add: x / 2 in cells
// −n … n, with n this number, and max(x, 0) in the others. The rest is small beside x, and so are its roundings.
inline int64_t half_ramp_cells(double width) {
  return static_cast<int64_t>(std::ceil(std::max(0.4 / width - 0.5, 0.0)));
}

// Coefficients [count][P] of a smooth base's derivative on every cell but the first and last, where they are 0.
template <class T> void fit_base(const Beneath& b, const Cells& cells, double* out) {
  constexpr int P = Precision<T>::kPoints;
  const auto& it = interpolation<T>();
  const int64_t halves = half_ramp_cells(cells.width);
  std::fill(out, out + static_cast<int64_t>(cells.count) * P, 0.0);
  for (int j = 1; j < cells.count - 1; ++j) {
    double coefficients[P] = {};
    const int64_t number = cells.first + j;
    for (int i = 0; i < P; ++i) {
      const double x = number * cells.width + it.points[i] * cells.width / 2;
      double value;
      if (b.order > 0) value = base_derivative(b.base, b.order, x);
      else if (std::abs(number) <= halves) value = base_derivative(b.base, 0, x) - x / 2;
      else value = base_derivative(b.base, 0, -std::abs(x));  // base(x) − x = base(−x)
      for (int m = 0; m < P; ++m) coefficients[m] += it.coefficients_of[i][m] * value;
    }
    if (b.order == 0 && number == 0) coefficients[0] = 0;  // so that what is left of the error shrinks with x
    std::copy(coefficients, coefficients + P, out + j * P);
  }
}

// Rounds up to 12 significant bits.
inline double round_up(double w) {
  int e;
  const double m = std::frexp(w, &e);
  return std::ldexp(std::ceil(m * 4096) / 4096, e);
}

// The highest order of derivative, n + 2m of ψ[n, m], that a plan's tables and sums are for.
inline int order_of(const Plan& p) {
  int order = p.sums_count ? p.moment_degree : 0;
  for (int u = 0; u < p.curves_count; ++u) order = std::max(order, p.curve_degree[u]);
  return order;
}

// How far from a point ψ is not negligible beside its peak, to two roundings of T.
template <class T> double reach_of(double gamma, int order) {
  using Pr = Precision<T>;
  return std::sqrt((order > 4 ? Pr::kHighTail[0] + Pr::kHighTail[1] * (order - 4) : Pr::kTail) / gamma);
}

// The width of cells, times sqrt(gamma). The error of interpolating ψ at P points is h^P times its P-th derivative, and
// that of order N has a peak sqrt(2^P (N + P)!/N!) times higher.
template <class T> double width_of(int order) {
  constexpr int P = Precision<T>::kPoints;
  double growth = 1;  // sqrt((4 + P)!/4! / ((N + P)!/N!))
  for (int i = 5; i <= order; ++i) growth *= std::sqrt(static_cast<double>(i) / (i + P));
  return Precision<T>::kWidth * std::pow(growth, 1.0 / P);
}

// Cells for a dictionary, at most `most` wide where that does not make them too many.
template <class T>
void place_cells(Basis& b, const double* points, int64_t d, bool permutes, int order, double most) {
  using Pr = Precision<T>;
  b.cells = Cells{};
  const double reach = reach_of<T>(b.gamma, order), span = points[d - 1] - points[0];
  const double low = points[0] - reach, high = points[d - 1] + reach;
  if (!(b.gamma > 0) || !std::isfinite(high - low)) return;
  double width = width_of<T>(order) / std::sqrt(b.gamma);
  // In cells much wider than the distances that matter, d² is lost against the error of interpolation.
  if (span > 0) width = std::clamp(span, width / 16, width);
  const bool narrow = width <= most || (high - low) / most < 128;
  if (narrow) width = std::min(width, most);
  const double wider = order > 4 ? 1 : 1.12;  // by which cells may be widened to fit
  const bool fits = permutes && (high - low) < width * wider * (kPermuteCells - 3.1);
  if (fits) width = (high - low) / (kPermuteCells - 3.1);
  // Normal numbers only, and cell numbers small enough that i · width is exact in T.
  if (!(width > 1e-30 && width < 1e30 && (high - low) / width < Pr::kMaxCells - 4)) return;
  width = round_up(width);
  const double first = std::ceil(low / width - 0.5) - 1, last = std::floor(high / width + 0.5) + 1;
  if (std::max(std::abs(first), std::abs(last)) >= Pr::kMaxCells) return;
  b.cells = Cells{width, static_cast<int64_t>(first), static_cast<int>(last - first) + 1, narrow};
  if (fits && b.cells.count <= kPermuteCells) b.cells.count = kPermuteCells;
}

// From one cell to the next, w wide, K(d + w) = K(d) r(d) with r(d) = exp(−γ w (2 d + w)), and
// r(d + w) = r(d) exp(−2γw²): two products in place of an exponential. After n steps K is off by about n² / 2 roundings
// of double.
template <class T> void fill_windows(const Basis& b, const double* points, int64_t d, int order, Windows& w) {
  constexpr int P = Precision<T>::kPoints, kSteps = Precision<T>::kSteps;
  using Values = Vector<P>;
  const auto& it = interpolation<T>();
  const int count = b.cells.count;
  const double gamma = b.gamma, width = b.cells.width, half = width / 2, reach = reach_of<T>(gamma, order) + half;
  w.begin.assign(count, 0);
  w.end.assign(count, 0);
  w.row.assign(count, 0);
  int rows = 0;
  for (int j = 1, lo = 0, hi = 0; j < count - 1; ++j) {
    const double centre = (b.cells.first + j) * width;
    while (lo < d && points[lo] < centre - reach) ++lo;
    while (hi < d && points[hi] <= centre + reach) ++hi;
    w.begin[j] = lo;
    w.end[j] = std::max(lo, hi);
    w.row[j] = rows;
    rows += w.end[j] - lo;
  }
  w.values.resize(static_cast<size_t>(rows) * (order + 1) * P);
  const Values shrink = Values::all(exp_double(-2 * gamma * width * width));
  for (int k = 0, from = 1, to = 1; k < d; ++k) {  // cells [from, to) have point k in their windows
    while (from < count - 1 && w.end[from] <= k) ++from;
    while (to < count - 1 && w.begin[to] <= k) ++to;
    for (int j = from, stop; j < to; j = stop) {
      stop = std::min(to, j + kSteps);
      double value_at[P], ratio_at[P];
      for (int i = 0; i < P; ++i) {
        const double at = ((b.cells.first + j) * width - points[k]) + it.points[i] * half;
        value_at[i] = exp_double(-gamma * at * at);
        ratio_at[i] = exp_double(-gamma * width * (2 * at + width));
      }
      Values value = Values::load(value_at), ratio = Values::load(ratio_at);
      for (int c = j; c < stop; ++c, value = value * ratio, ratio = ratio * shrink) {
        double at[P];
        for (int i = 0; i < P; ++i) at[i] = ((b.cells.first + c) * width - points[k]) + it.points[i] * half;
        double* out = w.values.data() + (static_cast<size_t>(w.row[c]) + k - w.begin[c]) * (order + 1) * P;
        Values power = value;
        for (int q = 0; q <= order; ++q, out += P, power = power * Values::load(at)) power.store(out);
      }
    }
  }
}

// A smooth base's derivative, as fit_base has it, in cells of its own: for x beyond a curve's cells.
struct BaseTable {
  static constexpr int P = Precision<float>::kPoints;
  Cells cells;
  std::vector<float> rows;  // [count][P]

  explicit BaseTable(const Beneath& b) {
    const double width = round_up(base_width(b.order));
    const double reach = b.base == kSilu ? 22 : 8.2;  // beyond, a tenth of a rounding of the peak is left
    const int last = static_cast<int>(std::ceil(reach / width + 0.5));
    cells = Cells{width, -last, 2 * last + 1};
    std::vector<double> coefficients(cells.count * P);
    fit_base<float>(b, cells, coefficients.data());
    if (b.order == 1) coefficients[2 * last * P] = 1;
    rows.assign(coefficients.begin(), coefficients.end());
  }
};

inline const BaseTable& base_table(const Beneath& b) {
  static const auto all = [] {
    std::vector<BaseTable> tables;
    for (int base : {kSilu, kGelu})
      for (int order = 0; order <= kMaxOrder; ++order) tables.emplace_back(Beneath{base, order});
    return tables;
  }();
  return all[(b.base == kGelu) * (kMaxOrder + 1) + b.order];
}

// Coefficients of the bases beneath the products' curves.
template <class T> void fit_bases(const Plan& p, const Cells& cells, Windows& w) {
  const int64_t size = static_cast<int64_t>(cells.count) * Precision<T>::kPoints;
  w.base.resize(p.products_count * size);
  for (int i = 0; i < p.products_count; ++i)
    if (held<T>(p.products[i].beneath)) fit_base<T>(p.products[i].beneath, cells, w.base.data() + i * size);
}

template <class T> void make_bases_of(Plan& p, int64_t begin, int64_t end) {
  const int64_t d = p.dictionary_size;
  const int order = order_of(p);
  double most = std::numeric_limits<double>::infinity();
  int bases = 0;
  for (int i = 0; i < p.products_count; ++i)
    if (const Beneath& b = p.products[i].beneath; held<T>(b)) most = std::min(most, base_width(b.order)), ++bases;
  for (int64_t row = begin; row < end && p.kernel == kGaussian; ++row) {
    Basis& b = p.bases[row];
    const double* points = p.points.data() + row * d;
    if (!std::all_of(points, points + d, [](double v) { return std::isfinite(v); })) continue;
    place_cells<T>(b, points, d, kPermutes && std::is_same_v<T, float>, order, most);
    if (b.cells.count == 0) continue;
    // A table pays only from some number of elements on. Multiply-adds to make and contract it, an exponential counted
    // as 8, against those of summing directly, 24 for each Gaussian and use.
    constexpr int P = Precision<T>::kPoints;
    const double window = std::min<double>(d, 1 + (2 * reach_of<T>(b.gamma, order) + b.cells.width) *
                                                      std::max<int64_t>(d - 1, 1) /
                                                      std::max(points[d - 1] - points[0], 1e-300));
    const int uses = p.curves_count + p.sums_count, fillings = (p.curves_count > 0) + (p.sums_count > 0);
    const double own = p.shared_basis ? 0 : window * Precision<T>::kFilling * fillings + 40 * bases;
    const double make = b.cells.count * P * (window * uses + P * uses + own);
    const double direct = static_cast<double>(p.positions) * d * 24 * uses;
    if (direct < make) b.cells.count = 0;
    else if (p.shared_basis) fill_windows<T>(b, points, d, order, p.windows), fit_bases<T>(p, b.cells, p.windows);
  }
}

// How many channels with the same windows are handled together, which are read once for all: as many as have registers
// for their sums. What a channel gets does not depend on it.
template <class T> constexpr int kTogether = std::max(1, 8 * kDoubles / Precision<T>::kPoints);

// Coefficients of one curve of N channels on every cell, from terms [N][D][degree + 1] to tables, `step` apart: rows
// [count][P], or columns [P][32] with cell i in column i mod 32. `order` is that of the windows, degree at most that.
// `base` [count][P] is what they hold of a base, nullptr for none.
template <class T, int N>
void fit(const Cells& cells, const Windows& w, int order, const double* base, const double* terms, int64_t d,
         int degree, bool columns, T* tables, int64_t step) {
  constexpr int P = Precision<T>::kPoints;
  using Values = Vector<P>;
  const auto& it = interpolation<T>();
  const double* values = w.values.data();
  const int64_t next = d * (degree + 1);  // channel's terms
  for (int j = 0; j < cells.count; ++j) {
    Values at[N];
    for (Values& v : at) v = Values::all(0);
    const double* t = terms + w.begin[j] * (degree + 1);
    for (int k = w.begin[j]; k < w.end[j]; ++k, values += int64_t{order - degree} * P)
      for (int q = 0; q <= degree; ++q, ++t, values += P) {
        const Values v = Values::load(values);
        KAF_UNROLL
        for (int n = 0; n < N; ++n) at[n] = at[n] + Values::all(t[n * next]) * v;
      }
    const int column = static_cast<int>((cells.first + j) & (kPermuteCells - 1));
    for (int n = 0; n < N; ++n) {
      double values_at[P], coefficients[P];
      at[n].store(values_at);
      Values c = base ? Values::load(base + j * P) : Values::all(0);
      for (int i = 0; i < P; ++i) c = c + Values::load(it.coefficients_of[i]) * Values::all(values_at[i]);
      c.store(coefficients);
      T* table = tables + n * step;
      for (int m = 0; m < P; ++m)
        (columns ? table[m * kPermuteCells + column] : table[j * P + m]) = static_cast<T>(coefficients[m]);
    }
  }
}

inline bool finite(const double* values, int64_t size) {
  double sums[8] = {};  // that need not wait for each other
  int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    for (int l = 0; l < 8; ++l) sums[l] += values[i + l] * 0.0;
  for (; i < size; ++i) sums[0] += values[i] * 0.0;
  return std::all_of(sums, sums + 8, [](double sum) { return sum == 0; });
}

// The windows of a channel: the shared ones, or this channel's made in `own`.
template <class T> const Windows& windows_of(const Plan& p, int64_t c, Windows& own) {
  if (p.shared_basis || p.bases[c].cells.count == 0) return p.windows;
  fill_windows<T>(p.bases[c], p.points.data() + c * p.dictionary_size, p.dictionary_size, order_of(p), own);
  return own;
}

// Whether run_columns does it: otherwise channels are handled as strided rows. Few channels would leave lanes idle.
inline bool columns_fit(const Plan& p) {
  return !kScalar && !p.float64 && p.channels_inner && (p.channels >= kFloats || kFloats % p.channels == 0);
}

// Whether channel c's tables are columns, [kPoints][kPermuteCells], to be looked up by permutes, or rows,
// [cells][kPoints]. Where channels are innermost, permutes go by squares: for half precision, which lanes would have to
// unpack into buffers, and while few tables leave room in the first cache and no sums want lanes.
template <class T> bool permuted(const Plan& p, int64_t c) {
  return kPermutes && std::is_same_v<T, float> && p.bases[p.shared_basis ? 0 : c].cells.count == kPermuteCells &&
         (!columns_fit(p) || (p.shared_basis && (p.x.type != Type::f32 ||
                                                 p.channels <= (p.sums_count ? kFloats : kColumns))));
}

template <class T> void make_tables_of(Plan& p, Windows& own, int64_t begin, int64_t end) {
  constexpr int P = Precision<T>::kPoints, N = kTogether<T>;
  const int64_t d = p.dictionary_size;
  const int order = order_of(p);
  for (int64_t c = begin, together; c < end; c += together) {
    together = p.shared_basis && c + N <= end ? N : 1;
    const Cells& cells = p.bases[p.shared_basis ? 0 : c].cells;
    const int64_t size = static_cast<int64_t>(cells.count) * P;
    if (size == 0) continue;
    const Windows& w = windows_of<T>(p, c, own);
    if (!p.shared_basis && p.holds_base) fit_bases<T>(p, cells, own);
    const bool columns = permuted<T>(p, c);
    T* table = reinterpret_cast<T*>(p.tables.get()) + p.table_offset[c];
    const int64_t step = p.curves_count * size;  // to the next channel's
    for (int u = 0; u < p.curves_count; ++u, table += size) {
      const int degree = p.curve_degree[u];
      const int64_t next = d * (degree + 1);
      const double* terms = p.curves.data() + p.curve_offset[u] + c * next;
      const double* base = p.holds_base && held<T>(p.products[u].beneath) ? w.base.data() + u * size : nullptr;
      if (together == N) fit<T, N>(cells, w, order, base, terms, d, degree, columns, table, step);
      else fit<T, 1>(cells, w, order, base, terms, d, degree, columns, table, step);
      for (int64_t n = 0; n < together; ++n)
        if (!finite(terms + n * next, next))
          std::fill(table + n * step, table + n * step + size, std::numeric_limits<T>::quiet_NaN());
    }
  }
}

// moments[k][q] = Σ_cells Σ_i s_i d_i^q exp(−γ d_i²) of N channels, with s a channel's sums [N][count][P] taken to the
// cells' Chebyshev points. Moments are by the order of points; `scratch` holds N D (degree + 1) P numbers.
template <class T, int N>
void contract_cells(const Cells& cells, const Windows& w, int order, int64_t d, const double* sums, int degree,
                    double* scratch, double* moments) {
  constexpr int P = Precision<T>::kPoints;
  using Values = Vector<P>;
  const auto& it = interpolation<T>();
  const double* values = w.values.data();
  const int64_t next = static_cast<int64_t>(cells.count) * P, each = d * (degree + 1);
  std::fill(scratch, scratch + N * each * P, 0.0);
  for (int j = 0; j < cells.count; ++j, sums += P) {
    if (w.begin[j] == w.end[j]) continue;
    Values s[N];
    for (int n = 0; n < N; ++n) {
      s[n] = Values::all(0);
      for (int m = 0; m < P; ++m) s[n] = s[n] + Values::load(it.values_of[m]) * Values::all(sums[n * next + m]);
    }
    double* a = scratch + w.begin[j] * (degree + 1) * P;
    for (int k = w.begin[j]; k < w.end[j]; ++k, values += int64_t{order - degree} * P)
      for (int q = 0; q <= degree; ++q, a += P, values += P) {
        const Values v = Values::load(values);
        KAF_UNROLL
        for (int n = 0; n < N; ++n) (Values::load(a + n * each * P) + s[n] * v).store(a + n * each * P);
      }
  }
  for (int64_t i = 0; i < N * each; ++i, scratch += P) moments[i] = Values::load(scratch).sum();
}

}  // namespace
}  // namespace KAF_ISA
}  // namespace kaf
