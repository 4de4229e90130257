// The loops of plan.h, compiled once for each instruction set: the including file defines KAF_ISA (a namespace) and the
// vector type V, or KAF_SCALAR for none, and puts its target pragma before this.
#include <algorithm>
#include <cmath>
#include <limits>

namespace kaf {
namespace KAF_ISA {

template <class T> struct Precision;
template <> struct Precision<float> {
  static constexpr int kPoints = 8;           // Chebyshev points and polynomial coefficients of a cell
  static constexpr double kTail = 20;         // a Gaussian below e^-kTail is 0
  static constexpr double kWidth = 0.52;      // of a cell, times sqrt(gamma): interpolation error 2e-8
  static constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  static constexpr int kMaxCells = 4096;
  using Int = int32_t;
};
template <> struct Precision<double> {
  static constexpr int kPoints = 16;
  static constexpr double kTail = 41;
  static constexpr double kWidth = 0.65;      // interpolation error 3e-17
  static constexpr double kMagic = 0x1.8p52;
  static constexpr int kMaxCells = 8192;
  using Int = int64_t;
};

constexpr int kTile = 1024;         // elements of one channel handled at a time
constexpr int kBlockTile = 256;     // positions of a block of channels handled at a time
constexpr int kBlock = 16;          // channels of a block, where channels are innermost
constexpr int kCopies = 4;          // of the cell sums, so that equal x do not wait for each other
constexpr int kPermuteCells = 32;   // tables of as many cells are looked up with permutes, where V has them

// ---------------------------------------------------------------------------------------------- basis and tables

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

// Values at the Chebyshev points of [-1, 1] to coefficients of v^m: Σ_i coefficients_of[i] value_i, and the transpose.
template <int P> struct Interpolation {
  Vector<P> points, coefficients_of[P], values_of[P];
  Interpolation() {
    const long double pi = 3.141592653589793238462643383279502884L;
    long double t[P][P] = {};  // t[n][m]: coefficient of v^m in the n-th Chebyshev polynomial
    t[0][0] = 1;
    if (P > 1) t[1][1] = 1;
    for (int n = 2; n < P; ++n)
      for (int m = 0; m < P; ++m) t[n][m] = (m > 0 ? 2 * t[n - 1][m - 1] : 0) - t[n - 2][m];
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
template <int P> const Interpolation<P>& interpolation() {
  static const Interpolation<P> it;
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
  const auto& it = interpolation<P>();
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
constexpr bool kPermutes = false;
#else
constexpr bool kPermutes = V::kPermutes;
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
  const auto& it = interpolation<P>();
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

// ------------------------------------------------------------------------------------- one channel's row of elements

// A cell grid in T, ready for the loops.
template <class T> struct Grid {
  T width, inverse, scale, low, high;  // scale makes v = 2 (x − centre) / width
  typename Precision<T>::Int first, count;
  explicit Grid(const Cells& c)
      : width(static_cast<T>(c.width)), inverse(static_cast<T>(1 / c.width)), scale(static_cast<T>(2 / c.width)),
        low(static_cast<T>(c.first * c.width)), high(static_cast<T>((c.first + c.count - 1) * c.width)),
        first(static_cast<typename Precision<T>::Int>(c.first)), count(c.count) {}

  // Cell number (from 0) and place within the cell of x. A NaN stays in v; its cell is any that exists.
  inline int locate(T x, T& v) const {
    using Pr = Precision<T>;
    const T clamped = x < low ? low : (x > high ? high : x);
    const T n = (clamped * inverse + Pr::kMagic) - Pr::kMagic;
    v = (clamped - n * width) * scale;
    const int i = static_cast<int>(x == x ? n : low * inverse) - static_cast<int>(first);
    return std::min(std::max(i, 0), static_cast<int>(count) - 1);
  }
};

template <class T>
void eval_scalar(const Grid<T>& grid, const T* table, const T* x, const T* w, T* out, int64_t n, bool add) {
  constexpr int P = Precision<T>::kPoints;
  for (int64_t e = 0; e < n; ++e) {
    T v;
    const T* row = table + grid.locate(x[e], v) * P;
    T y = row[P - 1];
    for (int m = P - 2; m >= 0; --m) y = y * v + row[m];
    if (w) y *= w[e];
    out[e] = add ? out[e] + y : y;
  }
}

template <class T> void spread_scalar(const Grid<T>& grid, const T* x, const T* w, int64_t n, double* sums) {
  constexpr int P = Precision<T>::kPoints;
  for (int64_t e = 0; e < n; ++e) {
    T v;
    double* row = sums + grid.locate(x[e], v) * P;
    T power[P];
    power[0] = w ? w[e] : T(1);
    for (int m = 1; m < P; ++m) power[m] = power[m - 1] * v;
    for (int m = 0; m < P; ++m) row[m] += power[m];
  }
}

#ifndef KAF_SCALAR

// A Grid<float> with every number in all lanes.
struct Lanes {
  V low, high, inverse, width, scale, magic;
  typename V::Int origin, last;
  explicit Lanes(const Grid<float>& g)
      : low(V::set(g.low)), high(V::set(g.high)), inverse(V::set(g.inverse)), width(V::set(g.width)),
        scale(V::set(g.scale)), magic(V::set(Precision<float>::kMagic)),
        origin(V::set_int(0x4b400000 + g.first)),  // the bits of kMagic
        last(V::set_int(g.count - 1)) {}

  // Place of x within its cell, and bits that end in the cell's index.
  inline V locate(V x, typename V::Int& bits) const {
    const V clamped = V::max(low, V::min(high, x));  // each returns its second operand where one is NaN
    const V t = V::fma(clamped, inverse, magic);
    bits = V::bits(t);
    return V::mul(V::fnma(V::sub(t, magic), width, clamped), scale);
  }
  // Cell numbers from 0; those of NaN, whatever they are, forced into range.
  inline typename V::Int row(typename V::Int bits) const { return V::min_unsigned(V::sub_int(bits, origin), last); }
};

template <bool Permute, bool Weighted, bool Add>
void eval_vector(const Grid<float>& g, const float* table, const float* x, const float* w, float* out, int64_t n) {
  constexpr int P = 8;
  const Lanes lanes(g);
  V low[P], high[P];
  if constexpr (Permute)
    for (int m = 0; m < P; ++m) {
      low[m] = V::load(table + m * kPermuteCells);
      high[m] = V::load(table + m * kPermuteCells + kPermuteCells / 2);
    }
  auto step = [&](const float* xe, const float* we, float* oe) __attribute__((always_inline)) {
    typename V::Int cell;
    const V v = lanes.locate(V::load(xe), cell);
    V y;
    if constexpr (Permute) {
      y = V::lookup(cell, low[P - 1], high[P - 1]);
      for (int m = P - 2; m >= 0; --m) y = V::fma(y, v, V::lookup(cell, low[m], high[m]));
    } else {
      V c[P];
      V::rows(table, lanes.row(cell), c);
      y = c[P - 1];
      for (int m = P - 2; m >= 0; --m) y = V::fma(y, v, c[m]);
    }
    if constexpr (Weighted && Add) y = V::fma(y, V::load(we), V::load(oe));
    else if constexpr (Weighted) y = V::mul(y, V::load(we));
    else if constexpr (Add) y = V::add(y, V::load(oe));
    V::store(oe, y);
  };
  int64_t e = 0;
  for (; e + V::kWidth <= n; e += V::kWidth) step(x + e, Weighted ? w + e : nullptr, out + e);
  if (e < n) {
    float xt[V::kWidth] = {}, wt[V::kWidth] = {}, ot[V::kWidth] = {};
    std::copy(x + e, x + n, xt);
    if (Weighted) std::copy(w + e, w + n, wt);
    if (Add) std::copy(out + e, out + n, ot);
    step(xt, wt, ot);
    std::copy(ot, ot + (n - e), out + e);
  }
}

template <bool Permute>
void eval_any(const Grid<float>& g, const float* table, const float* x, const float* w, float* out, int64_t n,
              bool add) {
  if (w) add ? eval_vector<Permute, true, true>(g, table, x, w, out, n)
             : eval_vector<Permute, true, false>(g, table, x, w, out, n);
  else add ? eval_vector<Permute, false, true>(g, table, x, w, out, n)
           : eval_vector<Permute, false, false>(g, table, x, w, out, n);
}

// sums[cell][m] += w v^m. Each element adds to one row of eight, in one of kCopies tables of rows that are zero between
// calls; short sums in float32, then added up in double.
inline void spread_vector(const Grid<float>& g, const float* x, const float* w, int64_t n, double* sums, float* copies) {
  constexpr int P = 8, W = V::kWidth, kGroup = 256;
  const int64_t stride = static_cast<int64_t>(g.count) * P;
  const Lanes lanes(g);
  char* base[kCopies];
  for (int i = 0; i < kCopies; ++i) base[i] = reinterpret_cast<char*>(copies + i * stride);
  // Rows and their places are made for a whole group before they are added, so that loads do not wait for stores.
  alignas(64) float quads[4 * kGroup], fourth[kGroup];
  alignas(64) uint32_t offset[kGroup];
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t size = std::min<int64_t>(n - begin, kGroup);
    const auto prepare = [&](int64_t e, V xe, V we) __attribute__((always_inline)) {
      typename V::Int cell;
      const V v = lanes.locate(xe, cell), v2 = V::mul(v, v), wv = V::mul(we, v);
      V::store_quads(quads + 4 * e, we, wv, V::mul(we, v2), V::mul(wv, v2));
      V::store(fourth + e, V::mul(v2, v2));
      V::store_int(offset + e, V::template shift_left<5>(lanes.row(cell)));
    };
    int64_t e = 0;
    for (; e + W <= size; e += W)
      prepare(e, V::load(x + begin + e), w ? V::load(w + begin + e) : V::set(1));
    if (e < size) {
      float xt[W] = {}, wt[W] = {};
      std::copy(x + begin + e, x + begin + size, xt);
      for (int64_t i = 0; i < size - e; ++i) wt[i] = w ? w[begin + e + i] : 1;
      prepare(e, V::load(xt), V::load(wt));
    }
    for (e = 0; e < size; e += W)
      for (int i = 0; i < 4; ++i)
        for (int l = 0; l < W / 4; ++l)
          V::add_row(base[i] + offset[e + 4 * l + i], quads + 4 * e + i * W + 4 * l, fourth + e + 4 * l + i);
  }
  static_assert(kCopies == 4);
  for (int64_t i = 0; i < stride; ++i)
    sums[i] += static_cast<double>((copies[i] + copies[i + stride]) + (copies[i + 2 * stride] + copies[i + 3 * stride]));
  std::fill(copies, copies + kCopies * stride, 0.0f);
}

#endif

template <class T>
void eval(const Grid<T>& g, const T* table, const T* x, const T* w, T* out, int64_t n, bool add) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>) {
    if (kPermutes && g.count == kPermuteCells) eval_any<kPermutes>(g, table, x, w, out, n, add);
    else eval_any<false>(g, table, x, w, out, n, add);
    return;
  }
#endif
  eval_scalar(g, table, x, w, out, n, add);
}

template <class T> void spread(const Grid<T>& g, const T* x, const T* w, int64_t n, double* sums, T* copies) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>) return spread_vector(g, x, w, n, sums, copies);
#endif
  spread_scalar(g, x, w, n, sums);
}

// The same without a table, for few elements or cells too many: every Gaussian, in double.
template <class T>
void eval_direct(const Plan& p, int64_t c, int curve, const T* x, const T* w, T* out, int64_t n, bool add) {
  const int64_t d = p.dictionary_size, row = p.shared_basis ? 0 : c;
  const double gamma = p.gamma[row], *points = p.dictionary.data() + row * d;
  const Term* terms = p.curves.data() + (curve * p.channels + c) * d;
  const int degree = p.curve_degree[curve];
  for (int64_t e = 0; e < n; ++e) {
    const double xe = std::isinf(x[e]) ? std::copysign(1e150, static_cast<double>(x[e])) : static_cast<double>(x[e]);
    double y = 0;
    for (int64_t k = 0; k < d; ++k) {
      const double at = xe - points[k];
      double poly = terms[k].p[degree];
      for (int q = degree - 1; q >= 0; --q) poly = poly * at + terms[k].p[q];
      const double value = exp_double(-gamma * at * at);
      y += value == 0 ? terms[k].p[0] * 0 : poly * value;
    }
    if (w) y *= w[e];
    out[e] = static_cast<T>(add ? out[e] + y : y);
  }
}

template <class T> void spread_direct(const Plan& p, int64_t c, const T* x, const T* w, int64_t n, double* moments) {
  const int64_t d = p.dictionary_size, row = p.shared_basis ? 0 : c;
  const double gamma = p.gamma[row], *points = p.dictionary.data() + row * d;
  for (int64_t e = 0; e < n; ++e) {
    const double xe = std::isinf(x[e]) ? std::copysign(1e150, static_cast<double>(x[e])) : static_cast<double>(x[e]);
    const double we = w ? w[e] : 1;
    for (int64_t k = 0; k < d; ++k) {
      const double at = xe - points[k], value = exp_double(-gamma * at * at);
      double term = we * value;
      const double step = value == 0 ? 0 : at;
      for (int q = 0; q <= p.moment_degree; ++q, term *= step) moments[k * (kMaxDegree + 1) + q] += term;
    }
  }
}

// ------------------------------------------------------------------------------------------------- tensors and tiles

inline float to_float(uint16_t h, Type type) {
  uint32_t bits;
  float f;
  if (type == Type::bf16) {
    bits = static_cast<uint32_t>(h) << 16;
  } else {  // shift the half's exponent and mantissa into place; the product corrects the bias, for subnormals too
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    std::memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  }
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t from_float(float f, Type type) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return static_cast<uint16_t>(bits >> 16 & 0x8000) | (type == Type::bf16 ? 0x7fc0 : 0x7e00);
  if (type == Type::bf16) return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const uint16_t sign = bits >> 16 & 0x8000;
  float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {  // subnormal: the unit in the last place is 2^-24; adding 2^-1 rounds to it
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits &= 0x7fffffff;
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
}

template <class T> void load_run(Type type, const char* src, int64_t stride, T* dst, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    const double* s = reinterpret_cast<const double*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = s[i * stride];
  } else if (type == Type::f32) {
    const float* s = reinterpret_cast<const float*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = s[i * stride];
  } else {
    const uint16_t* s = reinterpret_cast<const uint16_t*>(src);
    int64_t i = 0;
#ifndef KAF_SCALAR
    if (stride == 1)
      for (; i + V::kWidth <= n; i += V::kWidth) V::store(dst + i, V::load_half(s + i, type));
#endif
    for (; i < n; ++i) dst[i] = to_float(s[i * stride], type);
  }
}

template <class T> void store_run(Type type, char* dst, int64_t stride, const T* src, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    double* d = reinterpret_cast<double*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = src[i];
  } else if (type == Type::f32) {
    float* d = reinterpret_cast<float*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = src[i];
  } else {
    uint16_t* d = reinterpret_cast<uint16_t*>(dst);
    int64_t i = 0;
#ifndef KAF_SCALAR
    if (stride == 1)
      for (; i + V::kWidth <= n; i += V::kWidth) V::store_half(d + i, V::load(src + i), type);
#endif
    for (; i < n; ++i) d[i * stride] = from_float(src[i], type);
  }
}

// Calls f(offset in elements, index, length) for each stretch of positions [at, at + n) along the innermost dimension.
template <class F> void for_runs(const Plan& p, const View& v, int64_t at, int64_t n, F f) {
  const int inner = p.dims - 1;
  int64_t index[kMaxDims], rest = at;
  for (int i = inner; i >= 0; --i) {
    index[i] = rest % p.sizes[i];
    rest /= p.sizes[i];
  }
  for (int64_t done = 0; done < n;) {
    int64_t offset = 0;
    for (int i = 0; i <= inner; ++i) offset += index[i] * v.strides[i];
    const int64_t length = std::min(n - done, p.sizes[inner] - index[inner]);
    f(offset, done, length);
    done += length;
    index[inner] = 0;
    for (int i = inner - 1; i >= 0 && ++index[i] == p.sizes[i]; --i) index[i] = 0;
  }
}

template <class T> constexpr Type kNative = std::is_same_v<T, float> ? Type::f32 : Type::f64;

// Whether n positions from `at` lie in one run of unit stride and in T: then the loops work in place.
template <class T> bool in_place(const Plan& p, const View& v, int64_t at, int64_t n) {
  const int inner = p.dims - 1;
  return v.type == kNative<T> && v.strides[inner] == 1 && at % p.sizes[inner] + n <= p.sizes[inner];
}

template <class T> T* place(const Plan& p, const View& v, int64_t c, int64_t at) {
  T* found = nullptr;
  for_runs(p, v, at, 1, [&](int64_t offset, int64_t, int64_t) {
    found = reinterpret_cast<T*>(v.data) + c * v.channel_stride + offset;
  });
  return found;
}

template <class T> const T* load_row(const Plan& p, const View& v, int64_t c, int64_t at, int64_t n, T* buffer) {
  if (!v) return nullptr;
  if (in_place<T>(p, v, at, n)) return place<T>(p, v, c, at);
  const int bytes = size_of(v.type);
  for_runs(p, v, at, n, [&](int64_t offset, int64_t i, int64_t length) {
    load_run(v.type, v.data + (c * v.channel_stride + offset) * bytes, v.strides[p.dims - 1], buffer + i, length);
  });
  return buffer;
}

template <class T> void store_row(const Plan& p, const View& v, int64_t c, int64_t at, int64_t n, const T* buffer) {
  const int bytes = size_of(v.type);
  for_runs(p, v, at, n, [&](int64_t offset, int64_t i, int64_t length) {
    store_run(v.type, v.data + (c * v.channel_stride + offset) * bytes, v.strides[p.dims - 1], buffer + i, length);
  });
}

// Channels [c, c + kBlock) of n positions, channels innermost in memory, to rows[channel][n] and back.
template <class T>
void load_block(const Plan& p, const View& v, int64_t c, int64_t width, int64_t at, int64_t n, T* rows) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>)
    if (width == kBlock && v.channel_stride == 1) {
      const int bytes = size_of(v.type);
      for_runs(p, v, at, n, [&](int64_t offset, int64_t i, int64_t length) {
        const int64_t step = v.strides[p.dims - 1];
        int64_t done = 0;
        for (; done + V::kWidth <= length; done += V::kWidth)
          for (int part = 0; part < kBlock; part += V::kWidth) {
            V r[V::kWidth];
            for (int k = 0; k < V::kWidth; ++k)
              r[k] = V::load_any(v.data + (c + part + offset + (done + k) * step) * bytes, v.type);
            V::transpose(r);
            for (int k = 0; k < V::kWidth; ++k) V::store(rows + (part + k) * kBlockTile + i + done, r[k]);
          }
        for (int k = 0; k < kBlock; ++k)
          load_run(v.type, v.data + (c + k + offset + done * step) * bytes, step, rows + k * kBlockTile + i + done,
                   length - done);
      });
      return;
    }
#endif
  for (int64_t k = 0; k < width; ++k) {
    const T* row = load_row(p, v, c + k, at, n, rows + k * kBlockTile);
    if (row != rows + k * kBlockTile) std::copy(row, row + n, rows + k * kBlockTile);
  }
}

template <class T>
void store_block(const Plan& p, const View& v, int64_t c, int64_t width, int64_t at, int64_t n, const T* rows) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>)
    if (width == kBlock && v.channel_stride == 1) {
      const int bytes = size_of(v.type);
      for_runs(p, v, at, n, [&](int64_t offset, int64_t i, int64_t length) {
        const int64_t step = v.strides[p.dims - 1];
        int64_t done = 0;
        for (; done + V::kWidth <= length; done += V::kWidth)
          for (int part = 0; part < kBlock; part += V::kWidth) {
            V r[V::kWidth];
            for (int k = 0; k < V::kWidth; ++k) r[k] = V::load(rows + (part + k) * kBlockTile + i + done);
            V::transpose(r);
            for (int k = 0; k < V::kWidth; ++k)
              V::store_any(v.data + (c + part + offset + (done + k) * step) * bytes, r[k], v.type);
          }
        for (int k = 0; k < kBlock; ++k)
          store_run(v.type, v.data + (c + k + offset + done * step) * bytes, step, rows + k * kBlockTile + i + done,
                    length - done);
      });
      return;
    }
#endif
  for (int64_t k = 0; k < width; ++k) store_row(p, v, c + k, at, n, rows + k * kBlockTile);
}

// ------------------------------------------------------------------------------------------------------------- tasks

// The work of one channel on n elements that lie in memory as T.
template <class T> struct Row {
  const T *x, *grad, *grad_x;
  T *product, *outputs[kMaxOutputs];
};

template <class T> void run_row(const Plan& p, int64_t c, int64_t n, const Row<T>& r, double* sums, T* copies) {
  constexpr int P = Precision<T>::kPoints;
  const Cells& cells = p.bases[p.shared_basis ? 0 : c].cells;
  const Grid<T> grid(cells);
  const T* weights[] = {nullptr, r.grad, r.grad_x, r.product};
  if (r.grad && r.grad_x)
    for (int64_t e = 0; e < n; ++e) r.product[e] = r.grad[e] * r.grad_x[e];
  const T* tables = reinterpret_cast<const T*>(p.tables.get()) + p.table_offset[c];
  bool begun[kMaxOutputs] = {};
  for (int i = 0; i < p.products_count; ++i) {
    const Product& u = p.products[i];
    const T* table = tables + static_cast<int64_t>(u.curve) * cells.count * P;
    T* out = r.outputs[u.output];
    if (cells.count) eval(grid, table, r.x, weights[u.weight], out, n, begun[u.output]);
    else eval_direct(p, c, u.curve, r.x, weights[u.weight], out, n, begun[u.output]);
    begun[u.output] = true;
  }
  const int64_t size = cells.count ? static_cast<int64_t>(cells.count) * P : p.dictionary_size * (kMaxDegree + 1);
  for (int i = 0; i < p.sums_count; ++i, sums += size) {
    if (cells.count) spread(grid, r.x, weights[p.sums[i]], n, sums, copies);
    else spread_direct(p, c, r.x, weights[p.sums[i]], n, sums);
  }
}

template <class T> struct Buffers {
  alignas(64) T x[kBlock * kBlockTile], grad[kBlock * kBlockTile], grad_x[kBlock * kBlockTile], product[kTile],
      outputs[kMaxOutputs][kBlock * kBlockTile];
};
static_assert(kBlock * kBlockTile >= kTile && kTile >= kBlockTile);

// One channel, positions [begin, end).
template <class T>
void run_channel(const Plan& p, int64_t c, int64_t begin, int64_t end, double* sums, Buffers<T>& b, T* copies) {
  const int64_t inner = p.sizes[p.dims - 1];
  for (int64_t at = begin, n; at < end; at += n) {
    n = std::min<int64_t>(end - at, kTile);
    if (inner >= kTile / 4) n = std::min(n, inner - at % inner);  // stay in one run: in place where possible
    Row<T> r{load_row(p, p.x, c, at, n, b.x), load_row(p, p.grad, c, at, n, b.grad),
             load_row(p, p.grad_x, c, at, n, b.grad_x), b.product, {}};
    for (int i = 0; i < kMaxOutputs; ++i)
      if (p.outputs[i]) r.outputs[i] = in_place<T>(p, p.outputs[i], at, n) ? place<T>(p, p.outputs[i], c, at) : b.outputs[i];
    run_row(p, c, n, r, sums, copies);
    for (int i = 0; i < kMaxOutputs; ++i)
      if (r.outputs[i] == b.outputs[i]) store_row(p, p.outputs[i], c, at, n, b.outputs[i]);
  }
}

// A block of channels, innermost in memory, positions [begin, end).
template <class T>
void run_block(const Plan& p, int64_t c, int64_t width, int64_t begin, int64_t end, double* sums, Buffers<T>& b,
               T* copies) {
  for (int64_t at = begin, n; at < end; at += n) {
    n = std::min<int64_t>(end - at, kBlockTile);
    for (int64_t first = 0; first < width; first += kBlock) {
      const int64_t channels = std::min<int64_t>(width - first, kBlock);
      load_block(p, p.x, c + first, channels, at, n, b.x);
      if (p.grad) load_block(p, p.grad, c + first, channels, at, n, b.grad);
      if (p.grad_x) load_block(p, p.grad_x, c + first, channels, at, n, b.grad_x);
      for (int64_t k = 0; k < channels; ++k) {
        Row<T> r{b.x + k * kBlockTile, p.grad ? b.grad + k * kBlockTile : nullptr,
                 p.grad_x ? b.grad_x + k * kBlockTile : nullptr, b.product, {}};
        for (int i = 0; i < kMaxOutputs; ++i) r.outputs[i] = b.outputs[i] + k * kBlockTile;
        run_row(p, c + first + k, n, r, sums + p.sum_offset[c + first + k] - p.sum_offset[c], copies);
      }
      for (int i = 0; i < kMaxOutputs; ++i)
        if (p.outputs[i]) store_block(p, p.outputs[i], c + first, channels, at, n, b.outputs[i]);
    }
  }
}

struct alignas(64) Line {
  char bytes[64];
};

template <class T> void run_of(Plan& p, int64_t begin, int64_t end) {
  int most = 0;
  for (const Basis& b : p.bases) most = std::max(most, b.cells.count);
  const auto buffers = std::make_unique_for_overwrite<Buffers<T>>();
  std::vector<Line> copies(p.sums_count ? kCopies * most * Precision<T>::kPoints * sizeof(T) / sizeof(Line) + 1 : 0);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / p.blocks, c = task % p.blocks * p.block;
    const int64_t at = chunk * p.chunk, stop = std::min(at + p.chunk, p.positions);
    double* sums = p.sums_count ? p.partial.get() + chunk * p.sums_size + p.sum_offset[c] : nullptr;
    if (p.block == 1) run_channel(p, c, at, stop, sums, *buffers, reinterpret_cast<T*>(copies.data()));
    else run_block(p, c, std::min(p.block, p.channels - c), at, stop, sums, *buffers, reinterpret_cast<T*>(copies.data()));
  }
}

// -------------------------------------------------------------------------------------------------------- reductions

// moments[k][q] += Σ_cells Σ_i s_i d_i^q values_i, with s the cell's sums taken to its Chebyshev points.
template <class T> void contract_cells(const Basis& b, const double* sums, int degree, double* moments) {
  constexpr int P = Precision<T>::kPoints;
  const auto& it = interpolation<P>();
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

template <class T> void contract_of(Plan& p, int64_t begin, int64_t end) {
  constexpr int P = Precision<T>::kPoints;
  const int64_t d = p.dictionary_size, row = d * (kMaxDegree + 1);
  Basis own;
  for (int64_t c = begin; c < end; ++c) {
    const Basis& b = basis_with_values<T>(p, c, own);
    const int64_t size = b.cells.count ? static_cast<int64_t>(b.cells.count) * P : row;
    std::vector<double> sums(size);
    for (int i = 0; i < p.sums_count; ++i) {
      double* moments = p.moments.data() + (i * p.channels + c) * row;
      const double* partial = p.partial.get() + p.sum_offset[c] + i * size;
      double total = 0;
      for (int64_t m = 0; m < size; ++m) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += partial[chunk * p.sums_size + m];
        sums[m] = sum;
        total += sum * 0.0;
      }
      if (total != 0) std::fill(moments, moments + row, std::numeric_limits<double>::quiet_NaN());
      else if (b.cells.count) contract_cells<T>(b, sums.data(), p.moment_degree, moments);
      else std::copy(sums.begin(), sums.end(), moments);
    }
  }
}

// Sizes that depend on the cells: where each channel's tables and sums begin.
template <class T> void layout_of(Plan& p) {
  constexpr int P = Precision<T>::kPoints;
  p.table_offset.resize(p.channels);
  p.sum_offset.resize(p.channels);
  int64_t tables = 0, sums = 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t size = static_cast<int64_t>(p.bases[p.shared_basis ? 0 : c].cells.count) * P;
    p.table_offset[c] = tables;
    p.sum_offset[c] = sums;
    tables += size * p.curves_count;
    sums += (size ? size : p.dictionary_size * (kMaxDegree + 1)) * p.sums_count;
  }
  p.sums_size = sums;
  p.tables.reset(new char[tables * sizeof(T)]);
  p.partial.reset(new double[p.chunks * sums]());
}

#define KAF_BOTH(name)                                         \
  void name(Plan& p, int64_t begin, int64_t end) {             \
    p.float64 ? name##_of<double>(p, begin, end) : name##_of<float>(p, begin, end); \
  }
KAF_BOTH(make_bases)
KAF_BOTH(make_tables)
KAF_BOTH(run)
KAF_BOTH(contract)
#undef KAF_BOTH
inline void layout(Plan& p) { p.float64 ? layout_of<double>(p) : layout_of<float>(p); }

}  // namespace KAF_ISA

const Loops KAF_LOOPS{KAF_ISA_NAME, KAF_ISA::make_bases, KAF_ISA::make_tables, KAF_ISA::run, KAF_ISA::contract,
                      KAF_ISA::layout};

}  // namespace kaf
