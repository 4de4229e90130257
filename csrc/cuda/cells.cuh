// Curves as polynomials on cells, as on the CPU: tables of them, made by a launch of its own, and looked up.
//
// On a cell of width 0.52/√γ a curve is a polynomial of degree 7 to a tenth of a rounding, whatever D is and wherever the
// points lie. One launch evaluates curves at eight points of every cell, in float32 but for the polynomials through these
// values, and writes tables to memory. The kernels that follow copy them to shared memory, [curves][cells][8][32] with
// the lane innermost: each lane has its channel's table in a bank of its own, so that whatever cells they look up, no two
// lanes of a warp wait for each other. One channel to a block is then 32 copies of a table, channels_last 32 tables.
//
// γ and the points are on the device, and nothing may wait for them. So the host decides how many cells there is room
// for, by D, and the device where they lie. A channel for which they are too few has none, and sums over its points for
// each element, in the same loop.
//
// Napkin: float32 forward, an element costs 8 lookups, of a clock each for 32 elements, and 9 + 7 arithmetic instructions,
// where memory takes 18 clocks. A table for D = 20 is 35 cells: 5,600 exponentials, as many as 280 elements take directly.
#pragma once
#include "tiles.cuh"

namespace kaf {

constexpr float kMagic = 0x1.8p23f;   // adding it rounds to an integer, left in the low bits
constexpr float kGroupReach = 9.4868f;  // exp(−reach²) is below the smallest float32

// One channel: its points, and which x they matter to.
struct Channel {
  Cells cells;
  const Point* points;

  __device__ __forceinline__ Channel(const Call& call, int64_t channel)
      : cells(call.tables.cells[channel]), points(call.tables.points + channel * call.size) {}

  // x no farther from the points than where all is 0. NaN stays.
  __device__ __forceinline__ float clamped(float x) const { return clamp(x, cells.low, cells.high); }

  // use(v, d, K, point) for each of the elements x, clamped, and of the points [begin, end).
  template <int V, class Use>
  __device__ __forceinline__ void at_points(const float (&x)[V], int begin, int end, Use use) const {
    constexpr int kTogether = V < 4 ? V : 4;
    const float scale = gaussian_scale(cells.gamma);
#pragma unroll
    for (int from = 0; from < V; from += kTogether) {
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        const Point p = points[k];
#pragma unroll
        for (int v = from; v < from + kTogether; ++v) {
          const float d = (x[v] - p.high) - p.low, K = gaussian(d, scale);
          use(v, K == 0 ? 0 : d, K, p);  // no infinite distance times 0
        }
      }
    }
  }
};

// Its curves on cells: tables [curves][capacity][kCoefficients][kLanes], of which this is one lane.
template <int kLanes> struct Curves : Channel {
  const float* table;
  int capacity;

  __device__ __forceinline__ Curves(const Call& call, int64_t channel, const float* lane)
      : Channel(call, channel), table(lane), capacity(call.tables.capacity) {}

  struct Place {
    float v;           // in the cell, from −½ to ½
    const float* row;  // of the first curve
  };
  // The cell of a clamped x. NaN stays in v; its cell is some other.
  __device__ __forceinline__ Place find(float x) const {
    const float m = fmaf(x, cells.inverse, kMagic), number = m - kMagic;
    const uint32_t cell = __float_as_uint(m) - __float_as_uint(kMagic) - static_cast<uint32_t>(cells.first);
    const uint32_t row = min(cell, static_cast<uint32_t>(cells.count - 1));
    return {fmaf(-number, cells.width, x) * cells.inverse, table + row * (kCoefficients * kLanes)};
  }
  // The curve there that is so many from the first.
  __device__ __forceinline__ float polynomial(const Place& p, int curve) const {
    const float* row = p.row + curve * capacity * (kCoefficients * kLanes);
    float y = row[(kCoefficients - 1) * kLanes];
#pragma unroll
    for (int m = kCoefficients - 2; m >= 0; --m) y = fmaf(y, p.v, row[m * kLanes]);
    return y;
  }
};

// In shared memory, where each lane of a warp has the table of its channel.
struct SharedCurves : Curves<32> {
  __device__ __forceinline__ SharedCurves(const Call& call, int64_t channel, const float* shared)
      : Curves(call, channel, shared + threadIdx.x % 32) {}

  // Copies them there: before they are used, and before what that needs has registers.
  template <int kThreads> static __device__ __forceinline__ void prepare(const Call& call, int64_t channel, float* shared) {
    const Tables& t = call.tables;
    const int lane = threadIdx.x % 32;
    constexpr int kVectors = kCoefficients / 4;
    const int vectors = t.cells[channel].count * kVectors;
    for (int c = 0; c < t.count; ++c) {
      const auto* rows = reinterpret_cast<const Vector16<float>*>(t.rows) + (channel * t.count + c) * t.capacity * kVectors;
#pragma unroll 3  // four at once spill registers
      for (int i = threadIdx.x / 32; i < vectors; i += kThreads / 32) {
        const Vector16<float> row = rows[i];
        float* to = shared + (c * t.capacity * kVectors + i) * 4 * 32 + lane;
#pragma unroll
        for (int m = 0; m < 4; ++m) to[m * 32] = row.v[m];
      }
    }
    __syncthreads();
  }
  // The first curve at x, clamped.
  template <class T> __device__ __forceinline__ float operator()(T, float x) const { return polynomial(find(x), 0); }
};

}  // namespace kaf
