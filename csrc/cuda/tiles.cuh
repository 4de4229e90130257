// Who computes which elements, and how what the threads of a block have summed up comes together.
//
// Memory is a matrix [rows, columns] of runs of `inner` elements, a row at `pitch` elements from the next. Each column
// has one channel's parameters:
//
//     NCHW, one shared curve       columns = C,      inner = L, the elements of a channel that lie side by side
//     channels_last, [N, C]        columns = C · L,  inner = 1, L columns to a channel
//
// A block takes `columns_at_once` adjacent columns, and of each the runs of some rows, or a part of one run. Its threads
// stand side by side along the columns. With one column, threads take vectors of 16 bytes along the run; with many,
// single elements, which are side by side in memory across the threads of a warp.
//
// Only the address of a block's first element is computed in 64 bits: the launcher keeps rows_per_block · pitch below
// 2^31.
#pragma once
#include "arithmetic.cuh"

namespace kaf {

template <class A> __device__ __forceinline__ A read(const Parameter& p, int64_t channel, int64_t k) {
  if (!p.data) return 0;
  const int64_t i = channel * p.row + k * p.column;
  return p.is_double ? static_cast<A>(static_cast<const double*>(p.data)[i])
                     : static_cast<A>(static_cast<const float*>(p.data)[i]);
}

// δ of point k, to twice the precision.
template <class A> __device__ __forceinline__ Split<A> point(const Call& call, int64_t channel, int k) {
  if (call.dictionary.data) return split<A>(read<double>(call.dictionary, channel, k));
  return split<A>(call.size > 1 ? call.boundary * (2.0 * k / (call.size - 1) - 1) : 0.0);
}

__device__ __forceinline__ uint32_t quotient(uint32_t n, const Divisor& d) {
  return d.by == 1 ? n : __umulhi(n, d.magic) >> d.shift;
}

template <class T> struct alignas(16) Vector16 {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// The elements of one thread: tiles of kElements, which are side by side (kVector) or, kApart of them, a group of threads
// apart: at even distances in memory (kEvenly) where positions are, as in columns.
template <class T, bool kVector, int kApart = sizeof(T) == 8 ? 2 : 4, bool kEvenly = false> struct Tile {
  static constexpr int kElements = kVector ? Vector16<T>::kSize : kApart;
  static constexpr int kAccesses = kVector ? 1 : kElements;  // to memory, for one tile
  using Type = T;
  using A = typename Arithmetic<T>::type;

  const Tiling& t;
  int column, lane;   // of the thread: its column within the block, its place among the threads of that column
  int group;          // threads of a column
  int64_t j;          // its column
  uint32_t active;    // the block's columns that are computed: bit i for the i-th
  int count, tiles;   // positions of this block in a column, tiles of each thread
  int64_t chunk;      // which partial sums are this block's
  int64_t base;       // offset of the thread's column in the block's first row

  __device__ __forceinline__ Tile(const Tiling& tiling, uint32_t block) : t(tiling) {
    column = threadIdx.x & (t.columns_at_once - 1);
    lane = static_cast<int>(threadIdx.x) >> t.columns_shift;
    group = 1 << t.group_shift;
    const uint32_t block_of_columns = quotient(block, t.chunks), own_chunk = block - block_of_columns * t.chunks.by;
    const uint32_t row_block = quotient(own_chunk, t.run_blocks);
    chunk = own_chunk;
    j = int64_t{block_of_columns} * t.columns_at_once + column;
    const int64_t rest = t.columns - (j - column);
    active = 0xffffffffu >> (32 - (rest < t.columns_at_once ? static_cast<int>(rest) : t.columns_at_once));
    const int64_t row = int64_t{row_block} * t.rows_per_block, start = int64_t{own_chunk - row_block * t.run_blocks.by} * t.run;
    const int64_t rows = t.rows - row, run = t.inner - start;
    count = (rows < t.rows_per_block ? static_cast<int>(rows) : t.rows_per_block) *
            (run < t.run ? static_cast<int>(run) : t.run);
    tiles = ((count - 1) / kElements >> t.group_shift) + 1;
    base = row * t.pitch + j * t.inner + start;
  }

  __device__ __forceinline__ bool is_active(int i) const { return active >> i & 1; }
  __device__ __forceinline__ int64_t channel_of(int i) const {
    return quotient(static_cast<uint32_t>(j) - column + i, t.columns_per_channel);
  }
  // The channel of the thread; some other where there is none.
  __device__ __forceinline__ int64_t channel() const { return channel_of(is_active(column) ? column : 0); }

  // The thread's column of a tensor, from which a Place is an offset.
  template <class U> __device__ __forceinline__ U* column_of(U* data) const { return data ? data + base : nullptr; }

  // Where a tile's elements lie.
  struct Place {
    uint32_t offset[kAccesses];
    bool exists[kAccesses];
  };
  __device__ __forceinline__ Place place(int tile) const {
    Place p;
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      if constexpr (kEvenly) {  // from the first, which keeps fewer registers
        const int first = tile * (kElements << t.group_shift) + lane;
        p.exists[a] = is_active(column) && first < count - (a << t.group_shift);
        p.offset[a] = first * t.step + a * (t.step << t.group_shift);
      } else {
        const int q = kVector ? (tile * group + lane) * kElements : (tile * kElements + a) * group + lane;
        p.exists[a] = is_active(column) && q < count;
        p.offset[a] = q * t.step;
        if (kVector) p.offset[a] += (__umulhi(q, t.whole_run.magic) >> t.whole_run.shift) * t.row_step;
      }
    }
    if (!kVector && !kEvenly && t.row_step)  // of columns 0, which spares three instructions an element
#pragma unroll
      for (int a = 0; a < kAccesses; ++a) {
        const uint32_t row = __umulhi((tile * kElements + a) * group + lane, t.whole_run.magic) >> t.whole_run.shift;
        p.offset[a] += row * t.row_step;
      }
    return p;
  }

  // A tile's elements as they are in memory; 0 where there is none.
  static __device__ __forceinline__ void fetch(const T* column, const Place& p, T (&raw)[kElements]) {
    if constexpr (kVector) {
      Vector16<T> vector{};
      if (p.exists[0]) vector = *reinterpret_cast<const Vector16<T>*>(column + p.offset[0]);
#pragma unroll
      for (int v = 0; v < kElements; ++v) raw[v] = vector.v[v];
    } else {
#pragma unroll
      for (int v = 0; v < kElements; ++v) raw[v] = p.exists[v] ? column[p.offset[v]] : T();
    }
  }
  static __device__ __forceinline__ void load(const T* column, const Place& p, A (&out)[kElements]) {
    T raw[kElements];
    fetch(column, p, raw);
#pragma unroll
    for (int v = 0; v < kElements; ++v) out[v] = to_arithmetic(raw[v]);
  }
  static __device__ __forceinline__ void store(T* column, const Place& p, const A (&in)[kElements]) {
    if constexpr (kVector) {
      Vector16<T> vector;
#pragma unroll
      for (int v = 0; v < kElements; ++v) vector.v[v] = from_arithmetic<T>(in[v]);
      if (p.exists[0]) *reinterpret_cast<Vector16<T>*>(column + p.offset[0]) = vector;
    } else {
#pragma unroll
      for (int v = 0; v < kElements; ++v)
        if (p.exists[v]) column[p.offset[v]] = from_arithmetic<T>(in[v]);
    }
  }
};

// Sums over the threads of a column, one number for each of `count` sums: sums [count][threads] in shared memory, as
// the threads left them. use(i, column, total) is called once for each active column, by some thread. The order is fixed.
template <class A, class Tile, class Use>
__device__ __forceinline__ void sum_over_threads(const A* sums, int count, const Tile& tile, Use use) {
  const int columns_at_once = tile.t.columns_at_once;
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < count; i += tile.t.threads / 32) {
    A total = 0;
    for (int w = 0; w < tile.t.threads; w += 32) total += sums[i * tile.t.threads + w + lane];
    for (int offset = 16; offset >= columns_at_once; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (lane < columns_at_once && tile.is_active(lane)) use(i, lane, total);
  }
  __syncthreads();
}

__device__ __forceinline__ void store(const Gradient& g, int64_t i, double total) {
  if (g.is_double) static_cast<double*>(g.data)[i] = total;
  else static_cast<float*>(g.data)[i] = static_cast<float>(total);
}

// Leaves a block's sum for finish(), or for reduce_kernel().
template <class A, class Tile>
__device__ __forceinline__ void put_partial(const Tile& tile, const Call& call, int slot, int column, A total) {
  const int64_t j = tile.j - tile.column + column;
  static_cast<A*>(call.partial)[(tile.chunk * tile.t.columns + j) * call.slots + slot] = total;
}

// Where the call has its blocks finish: the block that is the last of its columns and window to come here adds up what
// all of these have left, in the order of the chunks. All threads of a block come here, after its last put_partial.
template <class A, class Tile>
__device__ __forceinline__ void finish(const Tile& tile, const Call& call, int window) {
  if (!call.finishes) return;
  const uint32_t chunks = tile.t.chunks.by;
  // What this block's threads have stored comes before the barrier, the barrier before the first fence of thread 0, and
  // that before its addition to the counter: whoever sees the sum of all additions sees all sums. There the second fence
  // keeps what follows the barrier from being read earlier, and __ldcg from a line of L1 that is older.
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t of_columns = quotient(quotient(blockIdx.x, call.windows), tile.t.chunks);
    const uint32_t counter = of_columns * call.windows.by + window;
    last = chunks == 1 || atomicAdd(call.counters + counter, 1u) == chunks - 1;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  const auto add = [&](const Gradient& g, int begin, int count) {
    if (g.slot < 0) return;
    for (int i = threadIdx.x; i < count * tile.t.columns_at_once; i += tile.t.threads) {
      const int column = i & (tile.t.columns_at_once - 1), k = begin + (i >> tile.t.columns_shift);
      if (!tile.is_active(column)) continue;
      const int64_t channel = tile.j - tile.column + column;  // which has one column
      const int64_t stride = tile.t.columns * call.slots;
      const A* partial = static_cast<const A*>(call.partial) + channel * call.slots + g.slot + k;
      double total = 0;
#pragma unroll 4
      for (uint32_t chunk = 0; chunk < chunks; ++chunk) total += __ldcg(partial + chunk * stride);
      store(g, channel * g.size + k, total);
    }
  };
  const int begin = window * kWindow<A>, count = min(kWindow<A>, call.size - begin);
  add(call.dalpha, begin, count);
  add(call.ddictionary, begin, count);
  if (window == 0) add(call.dgamma, 0, 1);
}

}  // namespace kaf
