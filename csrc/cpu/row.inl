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
  bool permuted;  // its tables are columns, which permutes look up
  explicit Grid(const Cells& c, bool permuted = false)
      : width(static_cast<T>(c.width)), inverse(static_cast<T>(1 / c.width)), scale(static_cast<T>(2 / c.width)),
        low(static_cast<T>(c.first * c.width)), high(static_cast<T>((c.first + c.count - 1) * c.width)),
        first(static_cast<typename Precision<T>::Int>(c.first)), count(c.count), permuted(permuted) {}

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

template <class T> const T* tables_of(const Plan& p) { return reinterpret_cast<const T*>(p.tables.get()); }

// Below which a ramp, or the slope of one, is 0: NaN, below which nothing is, makes the identity of ReLU.
template <class T> T floor_of(const Beneath& b) { return b.base == kRelu ? T(0) : std::numeric_limits<T>::quiet_NaN(); }

__attribute__((noinline)) inline double base_at(const Beneath& b, double x) {
  return base_derivative(b.base, b.order, x);
}

// What a base adds to the polynomial of the cell (from 0) of x, which may hold a part of it.
template <class T> class ScalarBase {
 public:
  ScalarBase(const Plan& p, const Beneath& b, const Grid<T>& g)
      : b_(b), floor_(floor_of<T>(b)), held_(p.holds_base && held<T>(b)), last_(static_cast<int>(g.count) - 1),
        zero_(static_cast<int>(-g.first)), halves_(static_cast<int>(half_ramp_cells(g.width))) {}

  T operator()(T x, int cell) const {
    if (!b_.smooth()) return b_.order == 0 ? (x < floor_ ? floor_ : x) : b_.order == 1 ? !(x <= floor_) : 0;
    if (!held_ || cell == 0 || cell == last_) return static_cast<T>(base_at(b_, x));
    return b_.order ? 0 : std::abs(cell - zero_) <= halves_ ? x / 2 : std::max(x, T(0));
  }

 private:
  Beneath b_;
  T floor_;
  bool held_;
  int last_, zero_, halves_;
};

template <class T>
void eval_scalar(const Plan& p, const Beneath& beneath, const Grid<T>& grid, const T* table, const T* x, const T* w,
                 T* out, int64_t n, bool add) {
  constexpr int P = Precision<T>::kPoints;
  const ScalarBase<T> base(p, beneath, grid);
  for (int64_t e = 0; e < n; ++e) {
    T v;
    const int cell = grid.locate(x[e], v);
    T y = Polynomials<T>::sum(table + cell * P, v);
    if (beneath.base) y += base(x[e], cell);
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

  // Each lane has the grid of its own that grid_of(l) is.
  template <class F> explicit Lanes(F grid_of) : Lanes(grid_of(0)) {
    alignas(64) float t[5][V::kWidth];
    alignas(64) uint32_t cell[2][V::kWidth];
    for (int l = 0; l < V::kWidth; ++l) {
      const Grid<float>& g = grid_of(l);
      t[0][l] = g.low, t[1][l] = g.high, t[2][l] = g.inverse, t[3][l] = g.width, t[4][l] = g.scale;
      cell[0][l] = 0x4b400000 + g.first, cell[1][l] = g.count - 1;
    }
    low = V::load(t[0]), high = V::load(t[1]), inverse = V::load(t[2]), width = V::load(t[3]), scale = V::load(t[4]);
    origin = V::load_int(cell[0]), last = V::load_int(cell[1]);
  }

  // Place of x within its cell, and bits that end in the cell's index.
  inline V locate(V x, typename V::Int& bits) const {
    const V clamped = V::max(low, V::min(high, x));  // each returns its second operand where one is NaN
    const V t = V::fma(clamped, inverse, magic);
    bits = V::bits(t);
    return V::mul(V::fnma(V::sub(t, magic), width, clamped), scale);
  }
  // Cell numbers from 0; those of NaN, whatever they are, forced into range.
  inline typename V::Int row(typename V::Int bits) const { return V::min_unsigned(V::sub_int(bits, origin), last); }
  // Where their rows of coefficients begin, in floats.
  inline typename V::Int offset(typename V::Int bits) const { return V::template shift_left<3>(row(bits)); }
};

// Σ_m c_m v^m, lane l's coefficients from table + row[l] on.
KAF_FN V polynomial_of(const float* table, const uint32_t* row, V v) {
  V c[8];
  V::quads_of([&](int l) { return table + row[l]; }, c);
  V::quads_of([&](int l) { return table + row[l] + 4; }, c + 4);
  V y = c[7];
  KAF_UNROLL
  for (int m = 6; m >= 0; --m) y = V::fma(y, v, c[m]);
  return y;
}

constexpr int kGroup = 256;  // elements whose places are found before their use, so that loads do not wait for stores

// What lies beneath a curve, for the loops over it. add(y, x, row): the value y of the curve at x plus the base, of
// which the curve's table may hold a part. place(x, v, row): what to add to the polynomial of `row` at v, both of which
// it may change, to come to the same. `row` is where lanes' rows of coefficients begin in the curve's table.
struct NoBase {
  V add(V y, V, typename V::Int) const { return y; }
};
struct Ramp {  // ReLU, or the identity
  V floor;
  V place(V x, V&, typename V::Int&) const { return V::max(floor, x); }
  V add(V y, V x, typename V::Int) const { return V::add(y, V::max(floor, x)); }
};
struct Step {  // their first derivatives
  V floor;
  V place(V x, V&, typename V::Int&) const { return V::step(x, floor); }
  V add(V y, V x, typename V::Int) const { return V::add(y, V::step(x, floor)); }
};

// The ramp that a table of a smooth base lacks, see half_ramp_cells.
struct HalfRamp {
  typename V::Int first, span;
  explicit HalfRamp(const Grid<float>& g) : first(V::set_int(first_of(g))), span(V::set_int(span_of(g))) {}
  // Each lane has the grid of its own that grid_of(l) is.
  template <class F> explicit HalfRamp(F grid_of) {
    alignas(64) uint32_t begin[V::kWidth], length[V::kWidth];
    for (int l = 0; l < V::kWidth; ++l) begin[l] = first_of(grid_of(l)), length[l] = span_of(grid_of(l));
    first = V::load_int(begin), span = V::load_int(length);
  }
  static int32_t first_of(const Grid<float>& g) { return 8 * (-g.first - cells_of(g)); }
  static int32_t span_of(const Grid<float>& g) { return 8 * 2 * cells_of(g); }
  static int32_t cells_of(const Grid<float>& g) { return static_cast<int32_t>(half_ramp_cells(g.width)); }
  V at(V x, typename V::Int row) const {
    return V::select(V::within(row, first, span), V::mul(V::set(0.5f), x), V::max(V::set(0), x));
  }
};

class Smooth {
 public:
  // A curve's cells end with `last`; its table begins `begin` floats after `table`, with the coefficient `spoilt`.
  Smooth(const Plan& p, const Product& u, const Grid<float>& own, const HalfRamp& ramp, typename V::Int last,
         const float* table, typename V::Int begin, V spoilt)
      : held_(p.holds_base), ramps_(u.beneath.order == 0), own_table_(tables_of<float>(p) + u.own_table), ramp_(ramp),
        own_ramp_(own), lanes_(own),
        shift_(V::sub_int(V::set_int(static_cast<int32_t>(own_table_ - table)), begin)), first_(V::set_int(8)),
        span_(V::sub_int(V::template shift_left<3>(last), V::set_int(16))), spoilt_(spoilt) {}

  V place(V x, V& v, typename V::Int& row) const {
    if (!held_) return value(x);
    V rest = ramps_ ? ramp_.at(x, row) : V::set(0);
    const auto known = V::within(row, first_, span_);
    if (V::all(known)) return rest;
    typename V::Int cell;
    const V place = lanes_.locate(x, cell);
    const typename V::Int own = lanes_.offset(cell);
    v = V::select(known, v, place);
    row = V::select_int(known, row, V::add_int(own, shift_));
    return V::add(ramps_ ? V::select(known, rest, own_ramp_.at(x, own)) : rest, spoilt_);
  }
  V add(V y, V x, typename V::Int row) const {
    if (!held_) return V::add(y, value(x));
    const V inside = ramps_ ? V::add(y, ramp_.at(x, row)) : y;
    const auto known = V::within(row, first_, span_);
    return V::all(known) ? inside : V::select(known, inside, V::add(y, value(x)));
  }

 private:
  __attribute__((noinline)) V value(V x) const {
    typename V::Int cell;
    const V v = lanes_.locate(x, cell);
    alignas(64) uint32_t row[V::kWidth];
    V::store_int(row, lanes_.offset(cell));
    const V y = polynomial_of(own_table_, row, v);
    return ramps_ ? V::add(y, own_ramp_.at(x, lanes_.offset(cell))) : y;
  }

  bool held_, ramps_;
  const float* own_table_;
  HalfRamp ramp_, own_ramp_;
  Lanes lanes_;                       // of the base's own cells
  typename V::Int shift_;             // from the curve's table to the base's own, so near that rows can tell
  typename V::Int first_, span_;      // rows of the curve's table that hold the base
  V spoilt_;                          // what is in the others: 0, or NaN in all of a curve that is not finite
};

// f(what lies beneath a curve), given smooth(own cells) for a smooth base.
template <class S, class F> void choose_base(const Beneath& b, S smooth, F f) {
  if (b.smooth()) f(smooth(Grid<float>(base_table(b).cells)));
  else if (b.base && b.order == 0) f(Ramp{V::set(floor_of<float>(b))});
  else if (b.base && b.order == 1) f(Step{V::set(floor_of<float>(b))});
  else f(NoBase{});
}
// The same, of a curve with these cells and this table.
template <class F> void choose_base(const Plan& p, const Product& u, const Grid<float>& g, const float* table, F f) {
  choose_base(u.beneath, [&](const Grid<float>& own) {
    return Smooth(p, u, own, HalfRamp(g), V::set_int(g.count - 1), table, V::set_int(0), V::set(table[0]));
  }, f);
}

// Places of a group of elements: v, where each one's row of coefficients begins, and what to add to its polynomial.
template <class Base> struct Places {
  static constexpr bool kAdds = !std::is_same_v<Base, NoBase>;
  alignas(64) float v[kGroup];
  alignas(64) uint32_t row[kGroup];
  alignas(64) float rest[kAdds ? kGroup : 1];
  // tables[l]: where lane l's table begins, in floats from the one given to value().
  void find(const Lanes& lanes, const Base& base, int e, V x, typename V::Int tables = V::set_int(0)) {
    typename V::Int cell;
    V at = lanes.locate(x, cell);
    typename V::Int begin = lanes.offset(cell);
    if constexpr (kAdds) V::store(rest + e, base.place(x, at, begin));
    V::store(v + e, at);
    V::store_int(row + e, V::add_int(begin, tables));
  }
  KAF_FN V value(int e, const float* table) const {
    const V y = polynomial_of(table, row + e, V::load(v + e));
    if constexpr (kAdds) return V::add(y, V::load(rest + e));
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

template <bool Add> inline V times(V y, V w, const float* out) {
  if constexpr (Add) return V::fma(y, w, V::load(out));
  return V::mul(y, w);
}
template <bool Weighted, bool Add> inline V weighted(V y, const float* w, const float* out) {
  if constexpr (Weighted) return times<Add>(y, V::load(w), out);
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

// out = [out +] [w] (curve(x) + base), with the table held in registers.
template <bool Weighted, bool Add, class Base>
void eval_permute(const Grid<float>& g, const float* table, const Base& base, const float* x, const float* w,
                  float* out, int64_t n) {
  const Lanes lanes(g);
  const PermuteTable held(table);
  const auto step = [&](const float* xe, const float* we, float* oe) __attribute__((always_inline)) {
    typename V::Int cell;
    const V value = V::load(xe), v = lanes.locate(value, cell);
    V::store(oe, weighted<Weighted, Add>(base.add(held.polynomial(cell, v), value, lanes.offset(cell)), we, oe));
  };
  int64_t e = 0;
  for (; e + V::kWidth <= n; e += V::kWidth) step(x + e, Weighted ? w + e : nullptr, out + e);
  if (e < n) {
    Tail xt(x + e, n - e), wt(Weighted ? w + e : nullptr, n - e), ot(Add ? out + e : nullptr, n - e);
    step(xt.data, wt.data, ot.data);
    std::copy(ot.data, ot.data + (n - e), out + e);
  }
}

// out = curve(x) + base in half precision, converted in registers.
template <class Base>
void eval_permute_half(const Grid<float>& g, const float* table, const Base& base, Type type, const uint16_t* x,
                       uint16_t* out, int64_t n) {
  constexpr int W = V::kWidth;
  const Lanes lanes(g);
  const PermuteTable held(table);
  const auto all = [&](auto half) __attribute__((always_inline)) {
    const auto step = [&](const uint16_t* xe, uint16_t* oe) __attribute__((always_inline)) {
      typename V::Int cell;
      const V value = V::load_half(xe, half), v = lanes.locate(value, cell);
      V::store_half(oe, base.add(held.polynomial(cell, v), value, lanes.offset(cell)), half);
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

// out = [out +] [w] (curve(x) + base), with a table of any number of cells in memory.
template <bool Weighted, bool Add, class Base>
void eval_rows(const Grid<float>& g, const float* table, const Base& base, const float* x, const float* w, float* out,
               int64_t n) {
  const Lanes lanes(g);
  Places<Base> places;
  for (int64_t begin = 0; begin < n; begin += kGroup, x += kGroup, w += Weighted ? kGroup : 0, out += kGroup) {
    const int length = static_cast<int>(std::min<int64_t>(n - begin, kGroup)), whole = length / V::kWidth * V::kWidth;
    for (int e = 0; e < whole; e += V::kWidth) places.find(lanes, base, e, V::load(x + e));
    if (whole < length) places.find(lanes, base, whole, V::load(Tail(x + whole, length - whole).data));
    for (int e = 0; e < whole; e += V::kWidth)
      V::store(out + e, weighted<Weighted, Add>(places.value(e, table), Weighted ? w + e : nullptr, out + e));
    if (whole < length) {
      Tail wt(Weighted ? w + whole : nullptr, length - whole), ot(Add ? out + whole : nullptr, length - whole);
      V::store(ot.data, weighted<Weighted, Add>(places.value(whole, table), wt.data, ot.data));
      std::copy(ot.data, ot.data + (length - whole), out + whole);
    }
  }
}

template <bool Weighted, bool Add, class Base>
void eval_vector(const Grid<float>& g, const float* table, const Base& base, const float* x, const float* w, float* out,
                 int64_t n) {
  if constexpr (kPermutes)
    if (g.permuted) return eval_permute<Weighted, Add>(g, table, base, x, w, out, n);
  eval_rows<Weighted, Add>(g, table, base, x, w, out, n);
}

// Sums of w v^m in float32, a row of eight for each cell. Every lane of a vector has a table of rows of its own (or
// shares one with few others), so that elements in the same cell do not wait for each other. Rows and their places are
// made for a whole group before they are added, so that loads do not wait for stores.
class Spreader {
 public:
  explicit Spreader(const Lanes& lanes) : lanes_(lanes) { forget(); }
  const Lanes& lanes() const { return lanes_; }

  // tables[l]: where lane l's table begins, in bytes from the base given to add(). Returns x's places in their cells.
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

  // Calls f(lane, begin, end) with the part of each lane's table, in floats, that was added to since the last call.
  template <class F> void used_by_lane(F f) {
    uint32_t low[V::kWidth], high[V::kWidth];
    V::store_int(low, lowest_);
    V::store_int(high, highest_);
    forget();
    for (int l = 0; l < V::kWidth; ++l) f(l, 8 * int64_t{low[l]}, 8 * int64_t{high[l]} + 8);
  }
  // The same for all lanes together: f(begin, end).
  template <class F> void used(F f) {
    int64_t from = std::numeric_limits<int64_t>::max(), to = 0;
    used_by_lane([&](int, int64_t low, int64_t high) {
      from = std::min(from, low);
      to = std::max(to, high);
    });
    f(from, to);
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

// One channel's row of elements; with Eval also out = w (curve(x) + base), from a table that permutes look up. Adding
// is limited by the load ports and leaves the memory idle, so it fetches the data of the tile that comes next.
template <bool Eval, class Base>
void spread_vector(const Grid<float>& g, const float* x, const float* w, int64_t n, double* sums, float* copies,
                   const Next<float>& next, const float* table, const Base& base, float* out) {
  constexpr int W = V::kWidth;
  const int64_t size = static_cast<int64_t>(g.count) * 8;
  const auto tables = V::steps(static_cast<int32_t>(size * 4), kCopies);
  Spreader spreader{Lanes(g)};
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int length = static_cast<int>(std::min<int64_t>(n - begin, kGroup));
    // Loaded again for each group, as adding takes the registers.
    const std::optional<PermuteTable> held = Eval ? std::optional<PermuteTable>(table) : std::nullopt;
    const auto step = [&](int e, const float* xe, const float* we, float* oe) __attribute__((always_inline)) {
      typename V::Int cell;
      const V value = V::load(xe), weight = V::load(we), v = spreader.prepare(e, value, weight, tables, cell);
      if constexpr (Eval)
        V::store(oe, V::mul(base.add(held->polynomial(cell, v), value, spreader.lanes().offset(cell)), weight));
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
void eval(const Plan& p, const Product& u, const Grid<T>& g, const T* table, const T* x, const T* w, T* out, int64_t n,
          bool add) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>)
    return choose_base(p, u, g, table, [&](const auto& base) {
      if (w && add) eval_vector<true, true>(g, table, base, x, w, out, n);
      else if (w) eval_vector<true, false>(g, table, base, x, w, out, n);
      else if (add) eval_vector<false, true>(g, table, base, x, w, out, n);
      else eval_vector<false, false>(g, table, base, x, w, out, n);
    });
#endif
  eval_scalar(p, u.beneath, g, table, x, w, out, n, add);
}

template <class T>
void spread(const Grid<T>& g, const T* x, const T* w, int64_t n, double* sums, T* copies, const Next<T>& next) {
#ifndef KAF_SCALAR
  if constexpr (std::is_same_v<T, float>) 
    return spread_vector<false>(g, x, w, n, sums, copies, next, nullptr, NoBase{}, nullptr);
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
void eval_direct(const Plan& p, int64_t c, const Product& product, const T* x, const T* w, T* out, int64_t n,
                 bool add) {
  const int64_t d = p.dictionary_size, row = p.shared_basis ? 0 : c;
  const double gamma = p.bases[row].gamma, *points = p.points.data() + row * d;
  const int degree = p.curve_degree[product.curve];
  const double* terms = p.curves.data() + p.curve_offset[product.curve] + c * d * (degree + 1);
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
    if (product.beneath.base) y += base_at(product.beneath, x[e]);
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
