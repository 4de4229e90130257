// One channel's row of elements, as T in memory: curves evaluated, and sums spread over cells.

namespace kaf {
namespace KAF_ISA {
namespace {

constexpr int kHeld = 512;   // elements that are summed in float32: more that are equal would lose digits
constexpr int kCopies = 4;   // of a row's sums, so that equal x do not wait for each other

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
template <int Count, class T>
void flush(T* tables, int64_t size, int64_t begin, int64_t end, double* sums) {
  for (int64_t i = begin; i < end; ++i) {
    T sum = tables[i];
    for (int t = 1; t < Count; ++t) sum += tables[t * size + i];
    sums[i] += sum;
  }
  for (int t = 0; t < Count; ++t) std::fill(tables + t * size + begin, tables + t * size + end, T(0));
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

// A table of kPermuteCells cells, held in registers.
struct PermuteTable {
  static constexpr int P = Precision<float>::kPoints;
  V low[P], high[P];
  explicit PermuteTable(const float* table) {
    for (int m = 0; m < P; ++m) {
      low[m] = V::load(table + m * kPermuteCells);
      high[m] = V::load(table + m * kPermuteCells + kPermuteCells / 2);
    }
  }
  inline __attribute__((always_inline)) V polynomial(typename V::Int cell, V v) const {  // Σ_m c_m v^m
    V y = V::lookup(cell, low[P - 1], high[P - 1]);
    KAF_UNROLL
    for (int m = P - 2; m >= 0; --m) y = V::fma(y, v, V::lookup(cell, low[m], high[m]));
    return y;
  }
};

// out = [out +] [w] curve(x), with the table held in registers.
template <bool Weighted, bool Add>
void eval_permute(const Grid<float>& g, const float* table, const float* x, const float* w, float* out, int64_t n) {
  const Lanes lanes(g);
  const PermuteTable held(table);
  const auto step = [&](const float* xe, const float* we, float* oe) __attribute__((always_inline)) {
    typename V::Int cell;
    const V v = lanes.locate(V::load(xe), cell);
    V::store(oe, weighted<Weighted, Add>(held.polynomial(cell, v), we, oe));
  };
  int64_t e = 0;
  for (; e + V::kWidth <= n; e += V::kWidth) step(x + e, Weighted ? w + e : nullptr, out + e);
  if (e < n) {
    Tail xt(x + e, n - e), wt(Weighted ? w + e : nullptr, n - e), ot(Add ? out + e : nullptr, n - e);
    step(xt.data, wt.data, ot.data);
    std::copy(ot.data, ot.data + (n - e), out + e);
  }
}

// out = curve(x) in half precision, converted in registers.
inline void eval_permute_half(const Grid<float>& g, const float* table, Type type, const uint16_t* x, uint16_t* out,
                              int64_t n) {
  constexpr int W = V::kWidth;
  const Lanes lanes(g);
  const PermuteTable held(table);
  const auto all = [&](auto half) __attribute__((always_inline)) {
    const auto step = [&](const uint16_t* xe, uint16_t* oe) __attribute__((always_inline)) {
      typename V::Int cell;
      const V v = lanes.locate(V::load_half(xe, half), cell);
      V::store_half(oe, held.polynomial(cell, v), half);
    };
    int64_t e = 0;
    for (; e + W <= n; e += W) step(x + e, out + e);
    if (e == n) return;
    uint16_t last[W] = {};
    std::copy(x + e, x + n, last);
    step(last, last);
    std::copy(last, last + (n - e), out + e);
  };
  if (type == Type::f16) all(std::integral_constant<Type, Type::f16>());
  else all(std::integral_constant<Type, Type::bf16>());
}

// out = [out +] [w] curve(x), with a table of any number of cells in memory.
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

  // tables[l]: where lane l's table begins, in bytes from the base given to add(). Returns the places of x in their cells.
  V prepare(int e, V x, V w, typename V::Int tables, typename V::Int& cell) {
    const V v = lanes_.locate(x, cell), v2 = V::mul(v, v), wv = V::mul(w, v);
    V::store_quads(quads_ + 4 * e, w, wv, V::mul(w, v2), V::mul(wv, v2));
    V::store(fourth_ + e, V::mul(v2, v2));
    const auto row = lanes_.row(cell);
    lowest_ = V::min_unsigned(lowest_, row);
    highest_ = V::max_unsigned(highest_, row);
    V::store_int(offset_ + e, V::add_int(V::template shift_left<5>(row), tables));
    return v;
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

// One channel's row of elements; with Eval also out = w curve(x), from a table that permutes look up. Adding is limited
// by the load ports and leaves the memory idle, so it fetches the data of the tile that comes next.
template <bool Eval>
void spread_vector(const Grid<float>& g, const float* x, const float* w, int64_t n, double* sums, float* copies,
                   const Next<float>& next, const float* table, float* out) {
  constexpr int W = V::kWidth;
  const int64_t size = static_cast<int64_t>(g.count) * 8;
  const auto tables = V::steps(static_cast<int32_t>(size * 4), kCopies);
  Spreader spreader(g);
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int length = static_cast<int>(std::min<int64_t>(n - begin, kGroup));
    // Loaded again for each group, as adding takes the registers.
    const std::optional<PermuteTable> held = Eval ? std::optional<PermuteTable>(table) : std::nullopt;
    const auto step = [&](int e, const float* xe, const float* we, float* oe) __attribute__((always_inline)) {
      typename V::Int cell;
      const V weight = V::load(we), v = spreader.prepare(e, V::load(xe), weight, tables, cell);
      if constexpr (Eval) V::store(oe, V::mul(held->polynomial(cell, v), weight));
    };
    int e = 0;
    for (; e + W <= length; e += W) step(e, x + begin + e, w + begin + e, Eval ? out + begin + e : nullptr);
    if (e < length) {
      Tail xt(x + begin + e, length - e), wt(w + begin + e, length - e), ot(nullptr, 0);
      step(e, xt.data, wt.data, ot.data);
      if constexpr (Eval) std::copy(ot.data, ot.data + (length - e), out + begin + e);
    }
    for (e = 0; e < length; e += W) {
      for (const float* p : next.data) __builtin_prefetch(p ? p + begin + e : x);
      spreader.add(e, reinterpret_cast<char*>(copies));
    }
    if ((begin + kGroup) % kHeld == 0 || begin + kGroup >= n)
      spreader.used([&](int64_t from, int64_t to) { flush<kCopies>(copies, size, from, to, sums); });
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
  if constexpr (std::is_same_v<T, float>) return spread_vector<false>(g, x, w, n, sums, copies, next, nullptr, nullptr);
#endif
  if constexpr (std::is_same_v<T, float>) return spread_scalar(g, x, w, n, sums);
  // Adding all to one sum would lose digits: each tile has its own first.
  spread_scalar(g, x, w, n, reinterpret_cast<double*>(copies));
  const int64_t size = static_cast<int64_t>(g.count) * Precision<T>::kPoints;
  flush<1>(copies, size, 0, size, sums);
}

// x − δ and exp(−γ (x − δ)²) for up to kBlock points of a dictionary, x taken to where its square is finite.
constexpr int kBlock = 32;
struct Gaussians {
  double at[kBlock], value[kBlock];
  Gaussians(double x, double gamma, const double* points, int64_t n) {
    const double xe = std::isinf(x) ? std::copysign(1e150, x) : x;
    for (int64_t i = 0; i < n; ++i) {
      at[i] = xe - points[i];
      value[i] = exp_double(-gamma * at[i] * at[i]);
    }
  }
};

// The same without a table, for few elements or cells too many: every Gaussian, in double.
template <class T>
void eval_direct(const Plan& p, int64_t c, int curve, const T* x, const T* w, T* out, int64_t n, bool add) {
  const int64_t d = p.dictionary_size, row = p.shared_basis ? 0 : c;
  const double gamma = p.bases[row].gamma, *points = p.points.data() + row * d;
  const int degree = p.curve_degree[curve];
  const double* terms = p.curves.data() + p.curve_offset[curve] + c * d * (degree + 1);
  for (int64_t e = 0; e < n; ++e) {
    double y = 0;
    const double* term = terms;
    for (int64_t k = 0; k < d; k += kBlock) {
      const int64_t length = std::min<int64_t>(d - k, kBlock);
      const Gaussians g(x[e], gamma, points + k, length);
      for (int64_t i = 0; i < length; ++i, term += degree + 1) {
        double poly = term[degree];
        for (int q = degree - 1; q >= 0; --q) poly = poly * g.at[i] + term[q];
        y += g.value[i] == 0 ? term[0] * 0 : poly * g.value[i];
      }
    }
    if (w) y *= w[e];
    out[e] = static_cast<T>(add ? out[e] + y : y);
  }
}

template <class T> void spread_direct(const Plan& p, int64_t c, const T* x, const T* w, int64_t n, double* moments) {
  const int64_t d = p.dictionary_size, row = p.shared_basis ? 0 : c;
  const double gamma = p.bases[row].gamma, *points = p.points.data() + row * d;
  for (int64_t e = 0; e < n; ++e) {
    const double we = w ? w[e] : 1;
    double* m = moments;
    for (int64_t k = 0; k < d; k += kBlock) {
      const int64_t length = std::min<int64_t>(d - k, kBlock);
      const Gaussians g(x[e], gamma, points + k, length);
      for (int64_t i = 0; i < length; ++i) {
        double term = we * g.value[i];
        const double step = g.value[i] == 0 ? 0 : g.at[i];
        for (int q = 0; q <= p.moment_degree; ++q, term *= step) *m++ += term;
      }
    }
  }
}

}  // namespace
}  // namespace KAF_ISA
}  // namespace kaf
