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
#include "columns.inl"
#include "kernels.inl"

namespace kaf {
namespace KAF_ISA {
namespace {

// The work of one channel on n elements that lie in memory as T.
template <class T> struct Row {
  const T *x, *grad, *v_x;
  T *product, *outputs[kMaxOutputs];
  Next<T> next;
};

template <class T> void run_products(const Plan& p, int64_t c, int64_t n, const Row<T>& r, const Grid<T>& grid) {
  constexpr int P = Precision<T>::kPoints;
  const T* weights[] = {nullptr, r.grad, r.v_x, r.product};
  if (r.grad && r.v_x)
    for (int64_t e = 0; e < n; ++e) r.product[e] = r.grad[e] * r.v_x[e];
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
  const T* weights[] = {nullptr, r.grad, r.v_x, r.product};
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
    if (grid.permuted && p.products_count == 1 && p.sums_count == 1 && p.products[0].weight == kGrad &&
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
      if (!grid.permuted) return false;
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
               load_row(p, p.v_x, k, at, n, b.v_x), b.product, {}, {}};
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

template <class T> void run_of(Plan& p, int64_t begin, int64_t end) {
  int most = 0;
  std::vector<Grid<T>> grids;
  for (size_t row = 0; row < p.bases.size(); ++row) {
    const Cells& cells = p.bases[row].cells;
    most = std::max(most, cells.count);
    grids.emplace_back(cells, permuted<T>(p, row));
  }
  const auto buffers = std::make_unique_for_overwrite<Buffers<T>>();
  constexpr int kTables = std::is_same_v<T, double> ? 1 : kScalar ? 0 : std::max(kCopies, kFloats);
  std::vector<Line> tables(p.sums_count ? kTables * most * Precision<T>::kPoints * sizeof(T) / sizeof(Line) : 0);
  T* const copies = reinterpret_cast<T*>(tables.data());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / p.blocks, c = p.first + task % p.blocks * p.block;
    const int64_t width = (task + 1) % p.blocks ? p.block : p.last - c;
    const int64_t at = chunk * p.chunk, stop = std::min(at + p.chunk, p.positions);
    double* sums = p.partial.get() + chunk * p.sums_size;  // of this chunk; the block's part of them is this task's own
    std::fill(sums + p.sum_offset[c], sums + (c + width < p.last ? p.sum_offset[c + width] : p.sums_size), 0.0);
#ifndef KAF_SCALAR
    if constexpr (std::is_same_v<T, float>)
      if (columns_fit(p)) {
        run_columns(p, c, width, at, stop, grids, sums, *buffers, copies, [&](int64_t channel, int64_t channels) {
          run_rows(p, channel, channels, at, stop, grids, sums, *buffers, copies);
        });
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

// Of tables and sums, in bytes, beside as much as x has.
constexpr int64_t kWorkspace = int64_t{8} << 20, kMostWorkspace = int64_t{1} << 30;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A> void reserve(std::unique_ptr<A[]>& array, int64_t& room, int64_t size) {
  if (size <= room && array) return;
  array.reset();
  array.reset(new A[room = size]);
}

// Channels from `first` on, as far as the workspace reaches, where their tables and sums begin, and their tasks.
template <class T> void layout_of(Plan& p) {
  constexpr int P = Precision<T>::kPoints;
  const int64_t x = p.channels * p.positions * size_of(p.x.type), workspace = std::min(x, kMostWorkspace) + kWorkspace;
  p.holds_base = std::all_of(p.bases.begin(), p.bases.end(), [](const Basis& b) { return b.cells.narrow; });
  p.table_offset.resize(p.channels);
  p.sum_offset.resize(p.channels);
  int64_t tables = 0, sums = 0;
  const auto bytes = [&] { return tables * int64_t{sizeof(T)} + sums * int64_t{sizeof(double)}; };
  for (p.last = p.first; p.last < p.channels && (p.last == p.first || bytes() < workspace); ++p.last) {
    const int64_t size = static_cast<int64_t>(p.bases[p.shared_basis ? 0 : p.last].cells.count) * P;
    p.table_offset[p.last] = tables;
    p.sum_offset[p.last] = sums;
    tables += size * p.curves_count;
    sums += (size ? size : direct_sums(p)) * p.sums_count;
  }
  if (const int64_t whole = p.first + (p.last - p.first) / kColumns * kColumns;
      p.last < p.channels && p.first < whole && whole < p.last) {  // whole blocks, but for the last round
    p.last = whole;
    tables = p.table_offset[p.last];
    sums = p.sum_offset[p.last];
  }
  p.sums_size = sums;

  // Tasks follow memory: a range of positions, all channels or some of many, and a few at least, for the threads to
  // share. Each leaves sums of its own, so it must be long enough for those not to count.
  const int64_t channels = p.last - p.first;
  int64_t most_chunks = std::clamp<int64_t>(p.positions / 2048, 1, 256);
  if (sums)
    most_chunks = std::clamp<int64_t>((workspace - bytes()) / (sums * int64_t{sizeof(double)}) + 1, 1, most_chunks);
  const int64_t wanted = ceil_div(8, most_chunks);
  if (columns_fit(p)) {  // a block that is all of a row of memory is fetched as it lies, but permutes go by squares
    const int64_t most = std::max<int64_t>(channels / kColumns, 1);
    const int64_t blocks = permuted<T>(p, p.first) ? most : std::clamp(wanted, ceil_div(channels, kMostColumns), most);
    p.block = ceil_div(most, blocks) * kColumns;
    p.blocks = std::max<int64_t>(channels / p.block, 1);
  } else {
    p.block = ceil_div(channels, std::clamp(wanted, ceil_div(channels, 64), channels));
    p.blocks = ceil_div(channels, p.block);
  }
  p.chunks = std::clamp<int64_t>(p.positions / 8192, ceil_div(8, p.blocks), 256);
  p.chunks = std::clamp<int64_t>(p.chunks, 1, most_chunks);
  p.chunk = ceil_div(p.positions, p.chunks);

  const int64_t all_channels = tables;
  for (int i = 0; i < p.products_count && !kScalar && std::is_same_v<T, float>; ++i)
    if (p.products[i].beneath.smooth()) {
      p.products[i].own_table = tables;
      tables += base_table(p.products[i].beneath).rows.size();
    }
  reserve(p.tables, p.tables_room, tables * int64_t{sizeof(T)} / int64_t{sizeof(Line)} + 1);
  for (int i = 0; i < p.products_count && tables > all_channels; ++i)
    if (const Product& u = p.products[i]; u.beneath.smooth()) {
      const std::vector<float>& rows = base_table(u.beneath).rows;
      std::copy(rows.begin(), rows.end(), reinterpret_cast<float*>(p.tables.get()) + u.own_table);
    }
  reserve(p.partial, p.partial_room, p.chunks * sums);
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
