// The loops of plan.h, compiled once for each instruction set: the including file defines KAF_ISA, its name in isa.h,
// and in that namespace the vector type V, or KAF_SCALAR for none, and puts its target pragma before this. All but the
// table at the end has internal linkage, or the linker might keep one instruction set's copy for the whole program.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "cells.inl"
#include "row.inl"
#include "memory.inl"
#include "kernels.inl"

namespace kaf {
namespace KAF_ISA {
namespace {

constexpr int kTile = 1024;   // elements of one channel handled at a time
constexpr int kColumns = 32;  // channels handled together where channels are innermost in memory
constexpr int kAhead = 32;    // positions that are fetched before they are needed

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
    if (grid.count) eval(p, u, grid, table, r.x, weights[u.weight], out, n, begun[u.output]);
    else eval_direct(p, c, u, r.x, weights[u.weight], out, n, begun[u.output]);
    begun[u.output] = true;
  }
}

inline int64_t direct_sums(const Plan& p) { return p.dictionary_size * (p.moment_degree + 1); }

template <class T>
void run_sums(const Plan& p, int64_t c, int64_t n, const Row<T>& r, const Grid<T>& grid, double* sums, T* copies) {
  const T* weights[] = {nullptr, r.grad, r.grad_x, r.product};
  const int64_t size = grid.count ? int64_t{grid.count} * Precision<T>::kPoints : direct_sums(p);
  for (int i = 0; i < p.sums_count; ++i, sums += size) {
    if (grid.count) spread(grid, r.x, weights[p.sums[i]], n, sums, copies, r.next);
    else spread_direct(p, c, r.x, weights[p.sums[i]], n, sums);
  }
}

template <class T>
void run_row(const Plan& p, int64_t c, int64_t n, const Row<T>& r, const Grid<T>& grid, double* sums, T* copies) {
  if (p.kernel != kGaussian) return run_kernel(p, c, n, r.x, r.grad, r.outputs[0], sums);
#ifndef KAF_SCALAR
  if constexpr (kPermutes && std::is_same_v<T, float>)
    // An ordinary backward pass finds the places of x once for both.
    if (grid.count == kPermuteCells && p.products_count == 1 && p.sums_count == 1 && p.products[0].weight == kGrad &&
        p.sums[0] == kGrad) {
      const float* table = reinterpret_cast<const float*>(p.tables.get()) + p.table_offset[c];
      return choose_base(p, p.products[0], grid, table, [&](const auto& base) {
        spread_vector<true>(grid, r.x, r.grad, n, sums, copies, r.next, table, base, r.outputs[p.products[0].output]);
      });
    }
#endif
  run_products(p, c, n, r, grid);
  run_sums(p, c, n, r, grid, sums, copies);
}

template <class T> struct Buffers {
  static constexpr int kSize = std::max(kTile, kColumns * kRow);
  alignas(64) T x[kSize], grad[kSize], grad_x[kSize], product[kTile], outputs[kMaxOutputs][kSize];
};

// A forward pass in half precision along runs of unit stride, where permutes look up the tables: needs no buffers.
template <class T>
bool eval_half_rows(const Plan& p, int64_t c, int64_t width, int64_t at, int64_t n, const std::vector<Grid<T>>& grids) {
#ifndef KAF_SCALAR
  if constexpr (kPermutes && std::is_same_v<T, float>) {
    const View &x = p.x, &out = p.outputs[0];
    if (x.type == Type::f32 || p.products_count != 1 || p.sums_count || p.products[0].weight != kOne ||
        p.products[0].output != 0 || !in_one_run(p, x, at, n) || !in_one_run(p, out, at, n))
      return false;
    for (const Grid<T>& grid : grids)
      if (grid.count != kPermuteCells) return false;
    const int64_t from = place_offset(p, x, at), to = place_offset(p, out, at);
    for (int64_t k = c; k < c + width; ++k) {
      const Grid<float>& grid = grids[p.shared_basis ? 0 : k];
      const float* table = tables_of<float>(p) + p.table_offset[k];
      choose_base(p, p.products[0], grid, table, [&](const auto& base) {
        eval_permute_half(grid, table, base, x.type,
                          reinterpret_cast<const uint16_t*>(x.data) + k * x.channel_stride + from,
                          reinterpret_cast<uint16_t*>(out.data) + k * out.channel_stride + to, n);
      });
    }
    return true;
  }
#endif
  return false;
}

// A block of channels, each a row of memory, positions [begin, end).
template <class T>
void run_rows(const Plan& p, int64_t c, int64_t width, int64_t begin, int64_t end, const std::vector<Grid<T>>& grids,
              double* sums, Buffers<T>& b, T* copies) {
  const int64_t inner = p.sizes[p.dims - 1];
  for (int64_t at = begin, n; at < end; at += n) {
    n = std::min<int64_t>(end - at, kTile);
    if (inner >= kTile / 4) n = std::min(n, inner - at % inner);  // stay in one run: in place where possible
    if (eval_half_rows(p, c, width, at, n, grids)) continue;
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
      run_row(p, k, n, r, grid, sums + p.sum_offset[k], copies);
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
void eval_square(const Plan& p, int64_t c, int64_t k, int64_t at, const Block& data, const Grid<float>& grid,
                 const Lanes& lanes) {
  constexpr int W = V::kWidth, P = Precision<float>::kPoints;
  const Type type = Half ? p.x.type : Type::f32;
  const auto each = [&](const Walk& w, auto use) __attribute__((always_inline)) {
    char* position = w.at(at, k);
    const int64_t step = w.step * (Half ? 2 : 4);
    KAF_UNROLL
    for (int i = 0; i < W; ++i, position += step) use(i, position);
  };
  alignas(64) float x[W * W], place[W * W], total[W * W];
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
    V::store(x + i * W, y[i]);
    V::store(place + i * W, lanes.locate(y[i], bits));
    V::store_int(cell + i * W, bits);
  }
  const float* const tables = reinterpret_cast<const float*>(p.tables.get()) + p.table_offset[c + k];
  const int64_t next = p.curves_count * (P * kPermuteCells);  // from one channel's tables to the next one's
  for (int u = 0; u < p.products_count; ++u) {
    const Product& product = p.products[u];
    const float* table = tables + product.curve * (P * kPermuteCells);
    choose_base(p, product, grid, table, [&](const auto& base) __attribute__((always_inline)) {
      KAF_UNROLL
      for (int i = 0; i < W; ++i, table += next) {
        const typename V::Int bits = V::load_int(cell + i * W);
        const V value = PermuteTable(table).polynomial(bits, V::load(place + i * W));
        y[i] = base.add(value, V::load(x + i * W), lanes.offset(bits));
      }
    });
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
            square(p, c, k, std::min(i, n - W), {x, grad, grad_x, {outputs[0], outputs[1]}}, grid, lanes);
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
            typename V::Int cell;
            spreader.prepare(static_cast<int>(e - from) * W, load_lanes(type, x.at(e, k)), w, sum_rows, cell);
          }
          for (int64_t e = from; e < to; ++e)
            spreader.add(static_cast<int>(e - from) * W, reinterpret_cast<char*>(held));
        }
        spreader.used([&](int64_t from, int64_t to) {
          for (int l = 0; l < W; ++l)
            flush<1>(held + l * size, size, from, to, sums + p.sum_offset[c + k + l] + i * size);
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
  std::vector<Line> tables(p.sums_count ? 16 * most * Precision<T>::kPoints * sizeof(T) / sizeof(Line) : 0);
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

template <class T> void contract_of(Plan& p, Windows& own, int64_t begin, int64_t end) {
  constexpr int P = Precision<T>::kPoints, N = kTogether<T>;
  const int64_t d = p.dictionary_size, row = direct_sums(p), step = p.moment_degree + 1;
  const int order = order_of(p);
  std::vector<double> sums, scratch(N * row * P), contracted(N * row);
  for (int64_t c = begin, together; c < end; c += together) {
    together = p.shared_basis && c + N <= end ? N : 1;
    const int64_t r = p.shared_basis ? 0 : c;
    const Cells& cells = p.bases[r].cells;
    const Windows& w = windows_of<T>(p, c, own);
    const int* places = p.order.data() + r * d;
    const int64_t size = cells.count ? static_cast<int64_t>(cells.count) * P : row;
    sums.resize(together * size);
    for (int i = 0; i < p.sums_count; ++i) {
      for (int64_t n = 0; n < together; ++n) {
        const double* partial = p.partial.get() + p.sum_offset[c + n] + i * size;
        double* sum = sums.data() + n * size;
        std::copy(partial, partial + size, sum);
        for (int64_t chunk = 1; chunk < p.chunks; ++chunk)
          for (int64_t m = 0; m < size; ++m) sum[m] += partial[chunk * p.sums_size + m];
      }
      const double* found = contracted.data();
      if (!cells.count) found = sums.data();
      else if (together == N)
        contract_cells<T, N>(cells, w, order, d, sums.data(), p.moment_degree, scratch.data(), contracted.data());
      else contract_cells<T, 1>(cells, w, order, d, sums.data(), p.moment_degree, scratch.data(), contracted.data());
      for (int64_t n = 0; n < together; ++n) {
        double* moments = p.moments.data() + (i * p.channels + c + n) * row;
        if (!finite(sums.data() + n * size, size)) {
          std::fill(moments, moments + row, std::numeric_limits<double>::quiet_NaN());
          continue;
        }
        for (int64_t k = 0; k < d; ++k) std::copy_n(found + (n * d + k) * step, step, moments + places[k] * step);
      }
    }
  }
}

// Sizes that depend on the cells: where each channel's tables and sums begin, and fewer chunks where cells are so many
// that the sums of all chunks would take more memory than the elements.
template <class T> void layout_of(Plan& p) {
  constexpr int P = Precision<T>::kPoints;
  p.holds_base = std::all_of(p.bases.begin(), p.bases.end(), [](const Basis& b) { return b.cells.narrow; });
  p.table_offset.resize(p.channels);
  p.sum_offset.resize(p.channels);
  int64_t tables = 0, sums = 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t size = static_cast<int64_t>(p.bases[p.shared_basis ? 0 : c].cells.count) * P;
    p.table_offset[c] = tables;
    p.sum_offset[c] = sums;
    tables += size * p.curves_count;
    sums += (size ? size : direct_sums(p)) * p.sums_count;
  }
  p.sums_size = sums;
  if (sums) {
    p.chunks = std::clamp<int64_t>(p.channels * p.positions / sums, 1, p.chunks);
    p.chunk = (p.positions + p.chunks - 1) / p.chunks;
  }
  const int64_t all_channels = tables;
  for (int i = 0; i < p.products_count && !kScalar && std::is_same_v<T, float>; ++i)
    if (p.products[i].beneath.smooth()) {
      p.products[i].own_table = tables;
      tables += base_table(p.products[i].beneath).rows.size();
    }
  p.tables.reset(new Line[tables * sizeof(T) / sizeof(Line) + 1]);
  for (int i = 0; i < p.products_count && tables > all_channels; ++i)
    if (const Product& u = p.products[i]; u.beneath.smooth()) {
      const std::vector<float>& rows = base_table(u.beneath).rows;
      std::copy(rows.begin(), rows.end(), reinterpret_cast<float*>(p.tables.get()) + u.own_table);
    }
  p.partial.reset(new double[p.chunks * sums]);
}

void make_bases(Plan& p, int64_t begin, int64_t end) {
  p.float64 ? make_bases_of<double>(p, begin, end) : make_bases_of<float>(p, begin, end);
}
void layout(Plan& p) { p.float64 ? layout_of<double>(p) : layout_of<float>(p); }
void make_tables(Plan& p, Windows& w, int64_t begin, int64_t end) {
  p.float64 ? make_tables_of<double>(p, w, begin, end) : make_tables_of<float>(p, w, begin, end);
}
void run(Plan& p, int64_t begin, int64_t end) {
  p.float64 ? run_of<double>(p, begin, end) : run_of<float>(p, begin, end);
}
void contract(Plan& p, Windows& w, int64_t begin, int64_t end) {
  p.float64 ? contract_of<double>(p, w, begin, end) : contract_of<float>(p, w, begin, end);
}

}  // namespace
}  // namespace KAF_ISA

#define KAF_JOIN(a, b) KAF_JOIN_(a, b)
#define KAF_JOIN_(a, b) a##b
#define KAF_NAME(a) KAF_NAME_(a)
#define KAF_NAME_(a) #a
const Loops KAF_JOIN(KAF_ISA, _loops){KAF_NAME(KAF_ISA), KAF_ISA::make_bases, KAF_ISA::layout,
                                      KAF_ISA::make_tables, KAF_ISA::run, KAF_ISA::contract};

}  // namespace kaf
