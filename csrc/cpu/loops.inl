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

constexpr int kTile = 1024;         // elements of one channel handled at a time
constexpr int kHeld = 512;          // of them that are summed in float32: more that are equal would lose digits
constexpr int kCopies = 4;          // of its cell sums, so that equal x do not wait for each other
constexpr int kColumns = 32;        // channels handled together where channels are innermost in memory
constexpr int kColumnTile = kHeld / kCopies;  // and positions, as each channel has one copy of its sums
constexpr int kRow = kColumnTile + 16;  // from one channel's row to the next in their buffers, not a multiple of 4 KiB
constexpr int kAhead = 32;          // positions that are fetched before they are needed
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

// Where the elements handled next lie: x and its weights, nullptr where not known.
template <class T> struct Next {
  const T* data[2] = {};
};

template <class T>
void eval_scalar(const Grid<T>& grid, const T* table, const T* x, const T* w, T* out, int64_t n, bool add) {
  constexpr int P = Precision<T>::kPoints;
  for (int64_t e = 0; e < n; ++e) {
    T v;
    const T* row = table + grid.locate(x[e], v) * P;
    T y = Polynomials<T>::sum(row, v);
    if (w) y *= w[e];
    out[e] = add ? out[e] + y : y;
  }
}

// sums += tables in [begin, end), each `size` long, which are zero again.
template <class T>
void flush(T* tables, int count, int64_t size, int64_t begin, int64_t end, double* sums) {
  for (int64_t i = begin; i < end; ++i) {
    T sum = tables[i];
    for (int t = 1; t < count; ++t) sum += tables[t * size + i];
    sums[i] += sum;
  }
  for (int t = 0; t < count; ++t) std::fill(tables + t * size + begin, tables + t * size + end, T(0));
}

// sums += w p_m(v), a row for each cell.
template <class T> void spread_scalar(const Grid<T>& grid, const T* x, const T* w, int64_t n, double* sums) {
  constexpr int P = Precision<T>::kPoints;
  for (int64_t e = 0; e < n; ++e) {
    T v;
    double* row = sums + grid.locate(x[e], v) * P;
    T terms[P];
    Polynomials<T>::weighted(w ? w[e] : T(1), v, terms);
    for (int m = 0; m < P; ++m) row[m] += terms[m];
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

constexpr int kGroup = 256;  // elements whose places are found before they are used, so that loads do not wait for stores

// Places of a group of elements: v, and where each one's row of coefficients begins, in floats.
struct Places {
  alignas(64) float v[kGroup];
  alignas(64) uint32_t row[kGroup];
  void find(const Lanes& lanes, int e, V x) {
    typename V::Int cell;
    V::store(v + e, lanes.locate(x, cell));
    V::store_int(row + e, V::template shift_left<3>(lanes.row(cell)));
  }
  V polynomial(int e, const float* table) const {  // Σ_m c_m v^m
    V c[8];
    V::quads_of([&](int l) { return table + row[e + l]; }, c);
    V::quads_of([&](int l) { return table + row[e + l] + 4; }, c + 4);
    const V at = V::load(v + e);
    V y = c[7];
    KAF_UNROLL
    for (int m = 6; m >= 0; --m) y = V::fma(y, at, c[m]);
    return y;
  }
};

// The last elements of a row, fewer than a vector, with zeros after them.
struct Tail {
  float data[V::kWidth] = {};
  Tail(const float* from, int64_t n) {
    if (from) std::copy(from, from + n, data);
  }
};

template <bool Weighted, bool Add> inline V weighted(V y, const float* w, const float* out) {
  if constexpr (Weighted && Add) return V::fma(y, V::load(w), V::load(out));
  if constexpr (Weighted) return V::mul(y, V::load(w));
  if constexpr (Add) return V::add(y, V::load(out));
  return y;
}

// out = [out +] [w] curve(x), with the table held in registers.
template <bool Weighted, bool Add>
void eval_permute(const Grid<float>& g, const float* table, const float* x, const float* w, float* out, int64_t n) {
  constexpr int P = 8;
  const Lanes lanes(g);
  V low[P], high[P];
  for (int m = 0; m < P; ++m) {
    low[m] = V::load(table + m * kPermuteCells);
    high[m] = V::load(table + m * kPermuteCells + kPermuteCells / 2);
  }
  const auto step = [&](const float* xe, const float* we, float* oe) __attribute__((always_inline)) {
    typename V::Int cell;
    const V v = lanes.locate(V::load(xe), cell);
    V y = V::lookup(cell, low[P - 1], high[P - 1]);
    KAF_UNROLL
    for (int m = P - 2; m >= 0; --m) y = V::fma(y, v, V::lookup(cell, low[m], high[m]));
    V::store(oe, weighted<Weighted, Add>(y, we, oe));
  };
  int64_t e = 0;
  for (; e + V::kWidth <= n; e += V::kWidth) step(x + e, Weighted ? w + e : nullptr, out + e);
  if (e < n) {
    Tail xt(x + e, n - e), wt(Weighted ? w + e : nullptr, n - e), ot(Add ? out + e : nullptr, n - e);
    step(xt.data, wt.data, ot.data);
    std::copy(ot.data, ot.data + (n - e), out + e);
  }
}

// The same with a table of any number of cells in memory.
template <bool Weighted, bool Add>
void eval_rows(const Grid<float>& g, const float* table, const float* x, const float* w, float* out, int64_t n) {
  const Lanes lanes(g);
  Places places;
  for (int64_t begin = 0; begin < n; begin += kGroup, x += kGroup, w += Weighted ? kGroup : 0, out += kGroup) {
    const int length = static_cast<int>(std::min<int64_t>(n - begin, kGroup)), whole = length / V::kWidth * V::kWidth;
    for (int e = 0; e < whole; e += V::kWidth) places.find(lanes, e, V::load(x + e));
    if (whole < length) places.find(lanes, whole, V::load(Tail(x + whole, length - whole).data));
    for (int e = 0; e < whole; e += V::kWidth)
      V::store(out + e, weighted<Weighted, Add>(places.polynomial(e, table), Weighted ? w + e : nullptr, out + e));
    if (whole < length) {
      Tail wt(Weighted ? w + whole : nullptr, length - whole), ot(Add ? out + whole : nullptr, length - whole);
      V::store(ot.data, weighted<Weighted, Add>(places.polynomial(whole, table), wt.data, ot.data));
      std::copy(ot.data, ot.data + (length - whole), out + whole);
    }
  }
}

template <bool Weighted, bool Add>
void eval_vector(const Grid<float>& g, const float* table, const float* x, const float* w, float* out, int64_t n) {
  if constexpr (kPermutes)
    if (g.count == kPermuteCells) return eval_permute<Weighted, Add>(g, table, x, w, out, n);
  eval_rows<Weighted, Add>(g, table, x, w, out, n);
}

// Sums of w v^m in float32, a row of eight for each cell. Every lane of a vector has a table of rows of its own (or
// shares one with few others), so that elements in the same cell do not wait for each other. Rows and their places are
// made for a whole group before they are added, so that loads do not wait for stores.
class Spreader {
 public:
  explicit Spreader(const Grid<float>& g) : lanes_(g) { forget(); }

  // tables[l]: where lane l's table begins, in bytes from the base given to add().
  void prepare(int e, V x, V w, typename V::Int tables) {
    typename V::Int cell;
    const V v = lanes_.locate(x, cell), v2 = V::mul(v, v), wv = V::mul(w, v);
    V::store_quads(quads_ + 4 * e, w, wv, V::mul(w, v2), V::mul(wv, v2));
    V::store(fourth_ + e, V::mul(v2, v2));
    const auto row = lanes_.row(cell);
    lowest_ = V::min_unsigned(lowest_, row);
    highest_ = V::max_unsigned(highest_, row);
    V::store_int(offset_ + e, V::add_int(V::template shift_left<5>(row), tables));
  }

  void add(int e, char* base) const {  // the V::kWidth elements prepared at e
    for (int i = 0; i < 4; ++i)
      for (int l = 0; l < V::kWidth / 4; ++l)
        V::add_row(base + offset_[e + 4 * l + i], quads_ + 4 * e + i * V::kWidth + 4 * l, fourth_ + e + 4 * l + i);
  }

  // Calls f(begin, end) with the part of each table, in floats, that was added to since this was last called.
  template <class F> void used(F f) {
    uint32_t low[V::kWidth], high[V::kWidth];
    V::store_int(low, lowest_);
    V::store_int(high, highest_);
    forget();
    f(8 * int64_t{*std::min_element(low, low + V::kWidth)}, 8 * int64_t{*std::max_element(high, high + V::kWidth)} + 8);
  }

 private:
  void forget() {
    lowest_ = V::set_int(Precision<float>::kMaxCells);
    highest_ = V::set_int(0);
  }

  Lanes lanes_;
  typename V::Int lowest_, highest_;
  alignas(64) float quads_[4 * kGroup], fourth_[kGroup];
  alignas(64) uint32_t offset_[kGroup];
};

// One channel's row of elements. Adding is limited by the load ports and leaves the memory idle, so it fetches the data
// of the tile that comes next.
inline void spread_vector(const Grid<float>& g, const float* x, const float* w, int64_t n, double* sums, float* copies,
                          const Next<float>& next) {
  constexpr int W = V::kWidth;
  const int64_t size = static_cast<int64_t>(g.count) * 8;
  const auto tables = V::steps(static_cast<int32_t>(size * 4), kCopies);
  Spreader spreader(g);
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int length = static_cast<int>(std::min<int64_t>(n - begin, kGroup));
    int e = 0;
    for (; e + W <= length; e += W)
      spreader.prepare(e, V::load(x + begin + e), V::load(w + begin + e), tables);
    if (e < length) {
      Tail xt(x + begin + e, length - e), wt(w + begin + e, length - e);
      spreader.prepare(e, V::load(xt.data), V::load(wt.data), tables);
    }
    for (e = 0; e < length; e += W) {
      for (const float* p : next.data) __builtin_prefetch(p ? p + begin + e : x);
      spreader.add(e, reinterpret_cast<char*>(copies));
    }
    if ((begin + kGroup) % kHeld == 0 || begin + kGroup >= n)
      spreader.used([&](int64_t from, int64_t to) { flush(copies, kCopies, size, from, to, sums); });
  }
}

#endif

template <class T>
void eval(const Grid<T>& g, const T* table, const T* x, const T* w, T* out, int64_t n, bool add) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>) {
    if (w) add ? eval_vector<true, true>(g, table, x, w, out, n) : eval_vector<true, false>(g, table, x, w, out, n);
    else add ? eval_vector<false, true>(g, table, x, w, out, n) : eval_vector<false, false>(g, table, x, w, out, n);
    return;
  }
#endif
  eval_scalar(g, table, x, w, out, n, add);
}

template <class T>
void spread(const Grid<T>& g, const T* x, const T* w, int64_t n, double* sums, T* copies, const Next<T>& next) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>) return spread_vector(g, x, w, n, sums, copies, next);
#endif
  if constexpr (std::is_same_v<T, float>) return spread_scalar(g, x, w, n, sums);
  // Adding all to one sum would lose digits: each tile has its own first.
  spread_scalar(g, x, w, n, reinterpret_cast<double*>(copies));
  const int64_t size = static_cast<int64_t>(g.count) * Precision<T>::kPoints;
  flush(copies, 1, size, 0, size, sums);
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

inline int64_t place_offset(const Plan& p, const View& v, int64_t at) {
  int64_t found = 0;
  for_runs(p, v, at, 1, [&](int64_t offset, int64_t, int64_t) { found = offset; });
  return found;
}

template <class T> T* place(const Plan& p, const View& v, int64_t c, int64_t at) {
  return reinterpret_cast<T*>(v.data) + c * v.channel_stride + place_offset(p, v, at);
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

#ifndef KAF_SCALAR

// dst[j][i] = src[i][j] for kWidth rows and columns.
inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  for (int j = 0; j < V::kWidth; j += 4) {
    V columns[4];
    V::quads_of([&](int i) { return src + i * src_stride + j; }, columns);
    for (int k = 0; k < 4; ++k) V::store(dst + (j + k) * dst_stride, columns[k]);
  }
}

// Between kWidth positions, `step` elements apart in a tensor, of kWidth neighbouring channels, and rows[channel].
inline void load_square(Type type, const char* src, int64_t step, float* rows) {
  if (type == Type::f32) return transpose(reinterpret_cast<const float*>(src), step, rows, kRow);
  alignas(64) float square[V::kWidth * V::kWidth];
  for (int i = 0; i < V::kWidth; ++i)
    V::store(square + i * V::kWidth, V::load_half(reinterpret_cast<const uint16_t*>(src) + i * step, type));
  transpose(square, V::kWidth, rows, kRow);
}
inline void store_square(Type type, char* dst, int64_t step, const float* rows) {
  if (type == Type::f32) return transpose(rows, kRow, reinterpret_cast<float*>(dst), step);
  alignas(64) float square[V::kWidth * V::kWidth];
  transpose(rows, kRow, square, V::kWidth);
  for (int i = 0; i < V::kWidth; ++i)
    V::store_half(reinterpret_cast<uint16_t*>(dst) + i * step, V::load(square + i * V::kWidth), type);
}

inline V load_lanes(Type type, const char* p) {
  return type == Type::f32 ? V::load(reinterpret_cast<const float*>(p))
                           : V::load_half(reinterpret_cast<const uint16_t*>(p), type);
}

#endif

// ------------------------------------------------------------------------------------------------------------- tasks

// The work of one channel on n elements that lie in memory as T.
template <class T> struct Row {
  const T *x, *grad, *grad_x;
  T *product, *outputs[kMaxOutputs];
  Next<T> next;
};

template <class T> void run_products(const Plan& p, int64_t c, int64_t n, const Row<T>& r, const Grid<T>& grid) {
  constexpr int P = Precision<T>::kPoints;
  const T* weights[] = {nullptr, r.grad, r.grad_x, r.product};
  if (r.grad && r.grad_x)
    for (int64_t e = 0; e < n; ++e) r.product[e] = r.grad[e] * r.grad_x[e];
  const T* tables = reinterpret_cast<const T*>(p.tables.get()) + p.table_offset[c];
  bool begun[kMaxOutputs] = {};
  for (int i = 0; i < p.products_count; ++i) {
    const Product& u = p.products[i];
    const T* table = tables + static_cast<int64_t>(u.curve) * grid.count * P;
    T* out = r.outputs[u.output];
    if (grid.count) eval(grid, table, r.x, weights[u.weight], out, n, begun[u.output]);
    else eval_direct(p, c, u.curve, r.x, weights[u.weight], out, n, begun[u.output]);
    begun[u.output] = true;
  }
}

template <class T>
void run_sums(const Plan& p, int64_t c, int64_t n, const Row<T>& r, const Grid<T>& grid, double* sums, T* copies) {
  const T* weights[] = {nullptr, r.grad, r.grad_x, r.product};
  const int64_t size =
      grid.count ? int64_t{grid.count} * Precision<T>::kPoints : p.dictionary_size * (kMaxDegree + 1);
  for (int i = 0; i < p.sums_count; ++i, sums += size) {
    if (grid.count) spread(grid, r.x, weights[p.sums[i]], n, sums, copies, r.next);
    else spread_direct(p, c, r.x, weights[p.sums[i]], n, sums);
  }
}

template <class T> struct Buffers {
  static constexpr int kSize = std::max(kTile, kColumns * kRow);
  alignas(64) T x[kSize], grad[kSize], grad_x[kSize], product[kTile], outputs[kMaxOutputs][kSize];
};

// A block of channels, each a row of memory, positions [begin, end).
template <class T>
void run_rows(const Plan& p, int64_t c, int64_t width, int64_t begin, int64_t end, const std::vector<Grid<T>>& grids,
              double* sums, Buffers<T>& b, T* copies) {
  const int64_t inner = p.sizes[p.dims - 1];
  for (int64_t at = begin, n; at < end; at += n) {
    n = std::min<int64_t>(end - at, kTile);
    if (inner >= kTile / 4) n = std::min(n, inner - at % inner);  // stay in one run: in place where possible
    for (int64_t k = c; k < c + width; ++k) {
      Row<T> r{load_row(p, p.x, k, at, n, b.x), load_row(p, p.grad, k, at, n, b.grad),
               load_row(p, p.grad_x, k, at, n, b.grad_x), b.product, {}, {}};
      if (p.sums_count && k + 1 < c + width) {
        if (r.x != b.x) r.next.data[0] = r.x + p.x.channel_stride;
        if (p.grad && r.grad != b.grad) r.next.data[1] = r.grad + p.grad.channel_stride;
      }
      for (int i = 0; i < kMaxOutputs; ++i)
        if (const View& out = p.outputs[i])
          r.outputs[i] = in_place<T>(p, out, at, n) ? place<T>(p, out, k, at) : b.outputs[i];
      const Grid<T>& grid = grids[p.shared_basis ? 0 : k];
      run_products(p, k, n, r, grid);
      run_sums(p, k, n, r, grid, sums + p.sum_offset[k], copies);
      for (int i = 0; i < kMaxOutputs; ++i)
        if (r.outputs[i] == b.outputs[i]) store_row(p, p.outputs[i], k, at, n, b.outputs[i]);
    }
  }
}

#ifndef KAF_SCALAR

// A tensor at channel c and position `at`, walked along its innermost position dimension.
struct Walk {
  char* data = nullptr;
  int64_t step = 0;  // in elements
  int bytes = 0;
  Walk(const Plan& p, const View& v, int64_t c, int64_t at) {
    if (!v) return;
    bytes = size_of(v.type);
    step = v.strides[p.dims - 1];
    data = v.data + (place_offset(p, v, at) + c) * bytes;
  }
  char* at(int64_t position, int64_t channel) const { return data + (position * step + channel) * bytes; }

  // Moves n positions of `width` channels to or from rows.
  template <class Square, class Run>
  void move(Type type, int64_t n, int64_t width, float* rows, Square square, Run run) const {
    constexpr int W = V::kWidth;
    const int64_t whole = n / W * W;
    for (int64_t i = 0; i < whole; i += W)
      for (int64_t k = 0; k < width; k += W) square(type, at(i, k), step, rows + k * kRow + i);
    for (int64_t k = 0; whole < n && k < width; ++k)
      run(type, at(whole, k), step, rows + k * kRow + whole, n - whole);
  }

  // Fetches this share of the n positions that come after the next `after`: all shares together fetch them all.
  void fetch(int64_t after, int64_t n, int64_t share, int64_t shares) const {
    if (!data) return;
    for (int64_t i = after + n * share / shares; i < after + n * (share + 1) / shares; ++i) {
      __builtin_prefetch(at(i, 0), 0, 2);
      __builtin_prefetch(at(i, 16), 0, 2);
    }
  }
};

// A block of channels of all tensors, from some position on.
struct Block {
  Walk x, grad, grad_x, outputs[kMaxOutputs];
};

// All products of kWidth positions from `at` and kWidth channels from k on, with the tables that permutes look up.
// x is transposed, so that a register holds one channel, and the values back: in registers, and nothing else is, as
// weights meet the values where they lie in memory. It goes through memory steadily, which the hardware can foresee.
template <class V, bool Half>  // V for what only a V that permutes has
void eval_square(const Plan& p, int64_t c, int64_t k, int64_t at, const Block& data, const Lanes& lanes) {
  constexpr int W = V::kWidth, P = Precision<float>::kPoints;
  const Type type = Half ? p.x.type : Type::f32;
  const auto each = [&](const Walk& w, auto use) __attribute__((always_inline)) {
    char* position = w.at(at, k);
    const int64_t step = w.step * (Half ? 2 : 4);
    KAF_UNROLL
    for (int i = 0; i < W; ++i, position += step) use(i, position);
  };
  alignas(64) float place[W * W], total[W * W];
  alignas(64) uint32_t cell[W * W];
  V y[W];
  each(data.x, [&](int i, const char* position) {
    y[i] = load_lanes(type, position);
    __builtin_prefetch(position + kAhead * data.x.step * (Half ? 2 : 4));
  });
  V::transpose(y);
  KAF_UNROLL
  for (int i = 0; i < W; ++i) {
    typename V::Int bits;
    V::store(place + i * W, lanes.locate(y[i], bits));
    V::store_int(cell + i * W, bits);
  }
  const float* const tables = reinterpret_cast<const float*>(p.tables.get()) + p.table_offset[c + k];
  const int64_t next = p.curves_count * (P * kPermuteCells);  // from one channel's tables to the next one's
  for (int u = 0; u < p.products_count; ++u) {
    const Product& product = p.products[u];
    const float* table = tables + product.curve * (P * kPermuteCells);
    KAF_UNROLL
    for (int i = 0; i < W; ++i, table += next) {
      const auto bits = V::load_int(cell + i * W);
      const V v = V::load(place + i * W);
      const auto lookup = [&](int m) __attribute__((always_inline)) {
        const float* column = table + m * kPermuteCells;
        return V::lookup(bits, V::load(column), V::load(column + kPermuteCells / 2));
      };
      y[i] = lookup(P - 1);
      KAF_UNROLL
      for (int m = P - 2; m >= 0; --m) y[i] = V::fma(y[i], v, lookup(m));
    }
    V::transpose(y);
    const auto weigh = [&](int i, const char* position) { y[i] = V::mul(y[i], load_lanes(type, position)); };
    if (product.weight == kGrad || product.weight == kProduct) each(data.grad, weigh);
    if (product.weight == kGradX || product.weight == kProduct) each(data.grad_x, weigh);
    if (u > 0 && p.products[u - 1].output == product.output) {
      KAF_UNROLL
      for (int i = 0; i < W; ++i) y[i] = V::add(y[i], V::load(total + i * W));
    }
    if (u + 1 < p.products_count && p.products[u + 1].output == product.output) {
      KAF_UNROLL
      for (int i = 0; i < W; ++i) V::store(total + i * W, y[i]);
    } else {
      const Walk& output = data.outputs[product.output];
      each(output, [&](int i, char* position) {
        __builtin_prefetch(position + kAhead * output.step * (Half ? 2 : 4), 1);
        if constexpr (Half) V::store_half(reinterpret_cast<uint16_t*>(position), y[i], type);
        else V::store(reinterpret_cast<float*>(position), y[i]);
      });
    }
  }
}

// Channels [c, c + width) innermost in memory, width at most kColumns and a multiple of 16, all with the same cells;
// positions [begin, end). Curves are evaluated by squares where permutes look up the tables. Otherwise tiles are
// transposed to and from rows of one channel: that waits for memory and evaluating does not, so the next tile is fetched
// meanwhile. Sums need neither, as every lane is a channel with sums of its own.
inline void run_columns(const Plan& p, int64_t c, int64_t width, int64_t begin, int64_t end, const Grid<float>& grid,
                        double* sums, Buffers<float>& b, float* held) {
  constexpr int W = V::kWidth, kPrepared = kGroup / W;
  Spreader spreader(grid);
  const Lanes lanes(grid);
  const int64_t size = grid.count * int64_t{8}, inner = p.sizes[p.dims - 1];
  const auto sum_rows = V::steps(static_cast<int32_t>(size * 4), W);
  const Type type = p.x.type;
  for (int64_t at = begin, n; at < end; at += n) {
    const int64_t left = std::min(end - at, inner - at % inner);
    n = std::min<int64_t>(left, kColumnTile);
    const Walk x(p, p.x, c, at), grad(p, p.grad, c, at), grad_x(p, p.grad_x, c, at);
    const Walk outputs[] = {{p, p.outputs[0], c, at}, {p, p.outputs[1], c, at}};
    if (p.products_count && kPermutes && grid.count == kPermuteCells && n >= W) {
      if constexpr (kPermutes) {
        const auto square = type == Type::f32 ? eval_square<V, false> : eval_square<V, true>;
        for (int64_t i = 0; i < n; i += W)  // the last may overlap the one before
          for (int64_t k = 0; k < width; k += W)
            square(p, c, k, std::min(i, n - W), {x, grad, grad_x, {outputs[0], outputs[1]}}, lanes);
      }
    } else if (p.products_count) {
      x.move(type, n, width, b.x, load_square, load_run<float>);
      if (grad.data) grad.move(type, n, width, b.grad, load_square, load_run<float>);
      if (grad_x.data) grad_x.move(type, n, width, b.grad_x, load_square, load_run<float>);
      for (int64_t k = 0; k < width; ++k) {
        for (const Walk* w : {&x, &grad, &grad_x, &outputs[0], &outputs[1]})
          w->fetch(n, std::min<int64_t>(left - n, kColumnTile), k, width);
        run_products(p, c + k, n,
                     Row<float>{b.x + k * kRow, grad.data ? b.grad + k * kRow : nullptr,
                                grad_x.data ? b.grad_x + k * kRow : nullptr, b.product,
                                {b.outputs[0] + k * kRow, b.outputs[1] + k * kRow}, {}},
                     grid);
      }
      for (int i = 0; i < kMaxOutputs; ++i)
        if (outputs[i].data) outputs[i].move(type, n, width, b.outputs[i], store_square, store_run<float>);
    }
    for (int i = 0; i < p.sums_count; ++i)
      for (int64_t k = 0; k < width; k += W) {
        for (int64_t from = 0; from < n; from += kPrepared) {
          const int64_t to = std::min<int64_t>(n, from + kPrepared);
          for (int64_t e = from; e < to; ++e) {
            V w = load_lanes(type, grad.at(e, k));
            if (p.sums[i] == kProduct) w = V::mul(w, load_lanes(type, grad_x.at(e, k)));
            spreader.prepare(static_cast<int>(e - from) * W, load_lanes(type, x.at(e, k)), w, sum_rows);
          }
          for (int64_t e = from; e < to; ++e)
            spreader.add(static_cast<int>(e - from) * W, reinterpret_cast<char*>(held));
        }
        spreader.used([&](int64_t from, int64_t to) {
          for (int l = 0; l < W; ++l)
            flush(held + l * size, 1, size, from, to, sums + p.sum_offset[c + k + l] + i * size);
        });
      }
  }
}

#endif

template <class T> void run_of(Plan& p, int64_t begin, int64_t end) {
  int most = 0;
  std::vector<Grid<T>> grids;
  for (const Basis& b : p.bases) {
    most = std::max(most, b.cells.count);
    grids.emplace_back(b.cells);
  }
  const auto buffers = std::make_unique_for_overwrite<Buffers<T>>();
  std::vector<Line> tables(16 * most * Precision<T>::kPoints * sizeof(T) / sizeof(Line) + 1);
  T* const copies = reinterpret_cast<T*>(tables.data());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / p.blocks, c = task % p.blocks * p.block, width = std::min(p.block, p.channels - c);
    const int64_t at = chunk * p.chunk, stop = std::min(at + p.chunk, p.positions);
    double* sums = p.partial.get() + chunk * p.sums_size;  // of this chunk; the block's part of them is this task's own
    std::fill(sums + p.sum_offset[c], sums + (c + width < p.channels ? p.sum_offset[c + width] : p.sums_size), 0.0);
#ifndef KAF_SCALAR
    if constexpr (std::is_same_v<T, float>)
      if (columns_fit(p)) {
        run_columns(p, c, width, at, stop, grids[0], sums, *buffers, copies);
        continue;
      }
#endif
    run_rows(p, c, width, at, stop, grids, sums, *buffers, copies);
  }
}

// -------------------------------------------------------------------------------------------------------- reductions

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

// Sizes that depend on the cells: where each channel's tables and sums begin, and fewer chunks where cells are so many
// that the sums of all chunks would take more memory than the elements.
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
  if (sums) {
    p.chunks = std::clamp<int64_t>(p.channels * p.positions / sums, 1, p.chunks);
    p.chunk = (p.positions + p.chunks - 1) / p.chunks;
  }
  p.tables.reset(new Line[tables * sizeof(T) / sizeof(Line) + 1]);
  p.partial.reset(new double[p.chunks * sums]);
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
