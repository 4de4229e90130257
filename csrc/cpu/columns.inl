// Channels innermost in memory (channels_last, [N, C]): neighbouring channels side by side, one in each lane of a vector.
//
// A lane has its own cells and tables, so channels may differ in all that they have, and its own sums, so nothing is
// transposed where tables lie in memory as rows. Where permutes look up the tables, which they do for one channel at a
// time, squares of positions and channels are transposed in registers.

namespace kaf {
namespace KAF_ISA {
namespace {

#ifndef KAF_SCALAR

constexpr int kAhead = 32;  // positions that squares fetch before they are needed

// Neighbouring channels, one in each lane of a vector. Where they are fewer than lanes, several positions share a
// vector: lane l is channel l mod width at position l / width, and those that are left over are idle.
struct alignas(64) Group {
  int64_t channel;                       // the first
  int width, positions;                  // channels, and positions in a vector
  bool permuted;                         // their tables
  int64_t size = 0;                      // of the largest table of a curve, in floats
  Lanes lanes;                           // the cells of each
  HalfRamp ramp;
  typename V::Int tables[kMaxProducts];  // where each one's table of a curve begins, in floats from the first one's

  Group(const Plan& p, int64_t c, int64_t channels, const std::vector<Grid<float>>& grids)
      : Group(p, c, channels, [&](int l) -> auto& { return grids[p.shared_basis ? 0 : c + l % channels]; }) {}

 private:
  template <class F>
  Group(const Plan& p, int64_t c, int64_t channels, F grid_of)
      : channel(c), width(static_cast<int>(channels)), positions(V::kWidth / width),
        permuted(KAF_ISA::permuted<float>(p, c)), lanes(grid_of), ramp(grid_of) {
    alignas(64) uint32_t begin[kMaxProducts][V::kWidth];
    for (int l = 0; l < V::kWidth; ++l) {
      const int64_t from = p.table_offset[c + l % width] - p.table_offset[c], each = grid_of(l).count * 8;
      size = std::max(size, each);
      for (int u = 0; u < kMaxProducts; ++u) begin[u][l] = static_cast<uint32_t>(from + u * each);
    }
    for (int u = 0; u < kMaxProducts; ++u) tables[u] = V::load_int(begin[u]);
  }
};

// Positions [at, at + n) of a block of channels [channel, channel + width), in all tensors.
struct Tile {
  static constexpr int kInputs = 3, kViews = kInputs + kMaxOutputs;
  const View* views[kViews];  // x, grad, v_x, outputs
  char* data[kViews] = {};    // where they begin
  int64_t channel, width, at, n;
  bool in_one_run, neighbours = true;  // positions at one stride in every tensor; channels at stride 1

  Tile(const Plan& p, int64_t c, int64_t channels, int64_t from, int64_t end)
      : views{&p.x, &p.grad, &p.v_x, &p.outputs[0], &p.outputs[1]}, channel(c), width(channels), at(from),
        n(std::min<int64_t>(end - from, kColumnTile)) {
    const int64_t inner = p.sizes[p.dims - 1], left = inner - at % inner;
    if (inner >= kColumnTile / 4) n = std::min(n, left);
    in_one_run = n <= left;
    for (int i = 0; i < kViews; ++i) {
      const View& v = *views[i];
      if (!v) continue;
      neighbours = neighbours && v.channel_stride == 1;
      data[i] = v.data + (place_offset(p, v, at) + c * v.channel_stride) * size_of(v.type);
    }
  }
};

// A group's vectors of one tensor, `step` bytes apart; and what to fetch meanwhile, from `next` on.
struct Walk {
  char* data = nullptr;
  int64_t step = 0;
  const char* next = nullptr;
  int64_t next_step = 0;
  char* at(int64_t i) const { return data + i * step; }
  float* floats(int64_t i) const { return reinterpret_cast<float*>(at(i)); }
  void fetch(int64_t i) const { __builtin_prefetch(next + i * next_step); }
};

// A group's part of a tile: in place, or packed into float32 buffers.
struct Block {
  bool in_place;
  Type type;
  int64_t vectors;
  Walk x, grad, v_x, outputs[kMaxOutputs];

  Block(const Plan& p, const Group& g, const Tile& t, Buffers<float>& buffers) {
    constexpr int W = V::kWidth;
    const int inner = p.dims - 1;
    vectors = (t.n + g.positions - 1) / g.positions;
    in_place = t.in_one_run && t.neighbours && g.width * g.positions == W && t.n % g.positions == 0 &&
               (g.permuted ? vectors >= W : p.x.type == Type::f32);
    for (const View* v : t.views)  // several positions in a vector are side by side
      in_place = in_place && (!*v || g.positions == 1 || v->strides[inner] == g.width);
    type = in_place ? p.x.type : Type::f32;
    Walk* const walks[] = {&x, &grad, &v_x, &outputs[0], &outputs[1]};
    float* const rows[] = {buffers.x, buffers.grad, buffers.v_x, buffers.outputs[0], buffers.outputs[1]};
    for (int i = 0; i < Tile::kViews; ++i) {
      const View& v = *t.views[i];
      if (!v) continue;
      const int64_t bytes = size_of(v.type), step = v.strides[inner] * bytes;
      Walk& w = *walks[i];
      w.data = in_place ? t.data[i] + (g.channel - t.channel) * bytes : reinterpret_cast<char*>(rows[i]);
      w.step = in_place ? step * g.positions : W * sizeof(float);
      w.next = w.at(in_place ? vectors : 0), w.next_step = w.step;
      if (t.in_one_run && t.neighbours && v.strides[inner] == t.width) {  // the next tile, as it lies in memory
        w.next_step = W * bytes;
        w.next = t.data[i] + t.n * (step + (g.channel - t.channel) * bytes);
      }
    }
  }
};

// Calls f(data in v, index in the buffer, elements) for what a group has at each of a tile's positions or, where they
// are side by side in v, in each vector. In this order whole vectors may be stored: what is too much is overwritten by
// the next, or lies in idle lanes.
template <class F> void for_packed(const Plan& p, const View& v, const Group& g, const Tile& t, F f) {
  const int64_t bytes = size_of(v.type), step = v.strides[p.dims - 1];
  const int64_t together = v.channel_stride == 1 && step == g.width && t.in_one_run ? g.positions : 1;
  for_runs(p, v, t.at, t.n, [&](int64_t offset, int64_t from, int64_t length) {
    char* data = v.data + (g.channel * v.channel_stride + offset) * bytes;
    int64_t vector = from / g.positions * V::kWidth, position = from % g.positions;
    for (int64_t left = length; left > 0; left -= together, data += together * step * bytes) {
      f(data, vector + position * g.width, static_cast<int>(std::min(together, left)) * g.width);
      position += together;
      if (position == g.positions) position = 0, vector += V::kWidth;
    }
  });
}
inline void pack(const Plan& p, const View& v, const Group& g, const Tile& t, float* buffer) {
  const auto all = [&](auto load) __attribute__((always_inline)) {
    for_packed(p, v, g, t, [&](const char* data, int64_t i, int count) { V::store(buffer + i, load(data, count)); });
  };
  if (v.channel_stride == 1 && v.type == Type::f32)
    return all([](const char* data, int count) { return V::load_some(reinterpret_cast<const float*>(data), count); });
  if (v.channel_stride == 1 && g.width == V::kWidth)
    return all([&](const char* data, int) { return load_lanes(v.type, data); });
  all([&](const char* data, int count) {
    alignas(64) float lanes[V::kWidth] = {};
    load_run(v.type, data, v.channel_stride, lanes, count);
    return V::load(lanes);
  });
}
inline void unpack(const Plan& p, const View& v, const Group& g, const Tile& t, const float* buffer) {
  if (v.channel_stride == 1 && v.type == Type::f32)
    return for_packed(p, v, g, t, [&](char* data, int64_t i, int count) {
      V::store_some(reinterpret_cast<float*>(data), V::load(buffer + i), count);
    });
  for_packed(p, v, g, t, [&](char* data, int64_t i, int count) {
    store_run(v.type, data, v.channel_stride, buffer + i, count);
  });
}

// out = [out +] [w [other]] (curve(x) + base) in float32, with tables in memory.
template <bool Weighted, bool Add, class Base>
void eval_lanes(const Group& g, int curve, const float* table, const Base& base, int64_t n, const Walk x, const Walk w,
                const Walk other, const Walk out) {
  constexpr int W = V::kWidth, kPrepared = kGroup / W;
  const Lanes lanes = g.lanes;
  const auto tables = g.tables[curve];
  Places<Base> places;
  for (int64_t from = 0; from < n; from += kPrepared) {
    const int64_t to = std::min<int64_t>(n, from + kPrepared);
    for (int64_t i = from; i < to; ++i) {
      x.fetch(i);
      places.find(lanes, base, static_cast<int>(i - from) * W, V::load(x.floats(i)), tables);
    }
    for (int64_t i = from; i < to; ++i) {
      out.fetch(i);
      if (Weighted) w.fetch(i);
      const V y = places.value(static_cast<int>(i - from) * W, table);
      if (Weighted && other.data) {  // the product first, as along rows
        const V both = V::mul(V::load(w.floats(i)), V::load(other.floats(i)));
        V::store(out.floats(i), times<Add>(y, both, out.floats(i)));
      } else {
        V::store(out.floats(i), weighted<Weighted, Add>(y, w.floats(i), out.floats(i)));
      }
    }
  }
}

inline void eval_group(const Plan& p, const Group& g, const Block& b) {
  const float* const table = tables_of<float>(p) + p.table_offset[g.channel];
  const Walk weights[] = {{}, b.grad, b.v_x, b.grad};
  for (int i = 0; i < p.products_count; ++i) {
    const Product& u = p.products[i];
    const bool add = i > 0 && p.products[i - 1].output == u.output;
    const auto smooth = [&](const Grid<float>& own) {
      alignas(64) uint32_t begin[V::kWidth];
      V::store_int(begin, g.tables[u.curve]);
      float spoilt[V::kWidth];
      for (int l = 0; l < V::kWidth; ++l) spoilt[l] = table[begin[l]];
      return Smooth(p, u, own, g.ramp, g.lanes.last, table, g.tables[u.curve], V::load(spoilt));
    };
    choose_base(u.beneath, smooth, [&](const auto& base) {
      const auto eval = [&](auto weighted, auto add) {
        eval_lanes<weighted, add>(g, u.curve, table, base, b.vectors, b.x, weights[u.weight],
                                  u.weight == kProduct ? b.v_x : Walk{}, b.outputs[u.output]);
      };
      constexpr std::true_type yes;
      constexpr std::false_type no;
      if (u.weight == kOne) add ? eval(no, yes) : eval(no, no);
      else add ? eval(yes, yes) : eval(yes, no);
    });
  }
}

// All products of kWidth vectors from `at` on, with the tables that permutes look up. x is transposed, so that a
// register holds one channel, and the values back: in registers, and nothing else is, as weights meet the values where
// they lie in memory. It goes through memory steadily, which the hardware can foresee.
template <class V, bool Half>  // V for what only a V that permutes has
void eval_square(const Plan& p, const Group& g, const Block& data, int64_t at, const Grid<float>& grid,
                 const Lanes& lanes) {
  constexpr int W = V::kWidth, P = Precision<float>::kPoints;
  const Type type = Half ? p.x.type : Type::f32;
  const auto each = [&](const Walk& w, auto use) __attribute__((always_inline)) {
    char* position = w.at(at);
    KAF_UNROLL
    for (int i = 0; i < W; ++i, position += w.step) use(i, position);
  };
  alignas(64) float x[W * W], place[W * W], total[W * W];
  alignas(64) uint32_t cell[W * W];
  V y[W];
  each(data.x, [&](int i, const char* position) {
    y[i] = load_lanes(type, position);
    __builtin_prefetch(position + kAhead * data.x.step);
  });
  V::transpose(y);
  KAF_UNROLL
  for (int i = 0; i < W; ++i) {
    typename V::Int bits;
    V::store(x + i * W, y[i]);
    V::store(place + i * W, lanes.locate(y[i], bits));
    V::store_int(cell + i * W, bits);
  }
  const float* const tables = tables_of<float>(p) + p.table_offset[g.channel];
  const int64_t next = p.curves_count * (P * kPermuteCells);  // from one channel's tables to the next one's
  for (int u = 0; u < p.products_count; ++u) {
    const Product& product = p.products[u];
    const float *const first = tables + product.curve * (P * kPermuteCells), *const end = first + g.width * next;
    const float* table = first;
    choose_base(p, product, grid, first, [&](const auto& base) __attribute__((always_inline)) {
      KAF_UNROLL
      for (int i = 0; i < W; ++i) {
        const typename V::Int bits = V::load_int(cell + i * W);
        const V value = PermuteTable(table).polynomial(bits, V::load(place + i * W));
        y[i] = base.add(value, V::load(x + i * W), lanes.offset(bits));
        table = table + next == end ? first : table + next;
      }
    });
    V::transpose(y);
    const auto weigh = [&](int i, const char* position) { y[i] = V::mul(y[i], load_lanes(type, position)); };
    if (product.weight == kGrad || product.weight == kProduct) each(data.grad, weigh);
    if (product.weight == kVx || product.weight == kProduct) each(data.v_x, weigh);
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
        __builtin_prefetch(position + kAhead * output.step, 1);
        if constexpr (Half) V::store_half(reinterpret_cast<uint16_t*>(position), y[i], type);
        else V::store(reinterpret_cast<float*>(position), y[i]);
      });
    }
  }
}

// `count` groups that permutes look up, side by side. A buffer has room for a square, in which rows may be idle.
inline void eval_squares(const Plan& p, const Group* groups, const Block* blocks, size_t count,
                         const Grid<float>& grid) {
  if constexpr (kPermutes) {
    if (!count || !p.products_count) return;
    const Lanes lanes(grid);
    const auto square = blocks->type == Type::f32 ? eval_square<V, false> : eval_square<V, true>;
    const int64_t last = std::max<int64_t>(blocks->vectors - V::kWidth, 0);  // which may overlap the one before
    for (int64_t i = 0; i < last + V::kWidth; i += V::kWidth)
      for (size_t k = 0; k < count; ++k) square(p, groups[k], blocks[k], std::min(i, last), grid, lanes);
  }
}

// Adds a group's sums. `held`: kWidth tables of g.size, all zero before and after.
template <bool Half> void sum_lanes(const Plan& p, const Group& g, const Block& b, double* sums, float* held) {
  constexpr int W = V::kWidth, kPrepared = kGroup / W;
  const Type type = Half ? b.type : Type::f32;
  const auto tables = V::steps(static_cast<int32_t>(g.size * 4), W);
  const Walk x = b.x, grad = b.grad, v_x = b.v_x;
  Spreader spreader(g.lanes);
  for (int s = 0; s < p.sums_count; ++s) {
    const bool product = p.sums[s] == kProduct;
    for (int64_t from = 0; from < b.vectors; from += kPrepared) {
      const int64_t to = std::min<int64_t>(b.vectors, from + kPrepared);
      for (int64_t i = from; i < to; ++i) {
        V w = load_lanes(type, grad.at(i));
        if (product) w = V::mul(w, load_lanes(type, v_x.at(i)));
        typename V::Int cell;
        spreader.prepare(static_cast<int>(i - from) * W, load_lanes(type, x.at(i)), w, tables, cell);
      }
      for (int64_t i = from; i < to; ++i) spreader.add(static_cast<int>(i - from) * W, reinterpret_cast<char*>(held));
    }
    spreader.used_by_lane([&](int l, int64_t from, int64_t to) {
      if (l >= g.width * g.positions) return;
      const int64_t c = g.channel + l % g.width, size = p.bases[p.shared_basis ? 0 : c].cells.count * int64_t{8};
      flush<1>(held + l * g.size, size, from, to, sums + p.sum_offset[c] + s * size);
    });
  }
}

// Channels [c, c + width), positions [begin, end); by_rows(first, channels) does those of groups without a table.
template <class F>
void run_columns(const Plan& p, int64_t c, int64_t width, int64_t begin, int64_t end,
                 const std::vector<Grid<float>>& grids, double* sums, Buffers<float>& buffers, float* held, F by_rows) {
  std::vector<Group> groups;
  for (int64_t k = 0; k < width; k += V::kWidth) {
    const int64_t channels = std::min<int64_t>(V::kWidth, width - k);
    bool tabulated = true;
    for (int64_t l = 0; l < channels; ++l) tabulated = tabulated && grids[p.shared_basis ? 0 : c + k + l].count;
    if (tabulated) groups.emplace_back(p, c + k, channels, grids);
    else by_rows(c + k, channels);
  }
  std::vector<Block> blocks;
  for (int64_t at = begin, next; at < end; at = next) {
    const Tile t(p, c, width, at, end);
    next = at + t.n;
    blocks.clear();
    for (const Group& g : groups) blocks.emplace_back(p, g, t, buffers);
    if (permuted<float>(p, c))
      eval_squares(p, groups.data(), blocks.data(),
                   std::count_if(blocks.begin(), blocks.end(), [](const Block& b) { return b.in_place; }), grids[0]);
    for (size_t k = 0; k < groups.size(); ++k) {
      const Group& g = groups[k];
      const Block& b = blocks[k];
      const auto rows = [](const Walk& w) { return w.floats(0); };
      if (!b.in_place) {
        if (p.x) pack(p, p.x, g, t, rows(b.x));
        if (p.grad) pack(p, p.grad, g, t, rows(b.grad));
        if (p.v_x) pack(p, p.v_x, g, t, rows(b.v_x));
      }
      if (!g.permuted) eval_group(p, g, b);
      else if (!b.in_place) eval_squares(p, &g, &b, 1, grids[0]);
      for (int i = 0; i < kMaxOutputs; ++i)
        if (!b.in_place && p.outputs[i]) unpack(p, p.outputs[i], g, t, rows(b.outputs[i]));
      if (!p.sums_count) continue;
      b.type == Type::f32 ? sum_lanes<false>(p, g, b, sums, held) : sum_lanes<true>(p, g, b, sums, held);
    }
  }
}

#endif

}  // namespace
}  // namespace KAF_ISA
}  // namespace kaf
