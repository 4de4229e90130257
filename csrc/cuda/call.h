// What one launch computes, as data: filled in by ops.cpp, read by the kernels. No device code, no torch.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

#include "../kaf_math.h"

namespace kaf {

// Threads of a block: where curves are evaluated on cells, forward and backward, and elsewhere.
constexpr int kForwardThreads = 512, kBackwardThreads = 256, kThreads = 128;
constexpr int kTablePoints = 512;  // D; larger dictionaries have no tables
constexpr int kMaxCurves = 6;      // of a call
constexpr int kFinished = 64;      // partial sums that a thread adds at most where blocks finish: see tiles.cuh
template <class A> constexpr int kWindow = 80 / sizeof(A);  // points whose sums one block forms

enum class Type : uint8_t { f32, f64, bf16, f16 };

// n / by for n < 2^31 is mulhi(n, magic) >> shift: see quotient() in tiles.cuh. A division would be a dozen instructions.
struct Divisor {
  uint32_t by = 1, magic = 0;
  int shift = 0;
};
inline Divisor divisor(int64_t by) {
  if (by == 1) return {};
  const int s = std::bit_width(static_cast<uint32_t>(by - 1));  // ceil(log2(by))
  return {static_cast<uint32_t>(by), static_cast<uint32_t>(((uint64_t{1} << (31 + s)) + by - 1) / by), s - 1};
}

// Who computes which elements: see tiles.cuh.
struct Tiling {
  int threads;
  int64_t rows, pitch, inner, columns;
  Divisor columns_per_channel;
  Divisor chunks, run_blocks;  // blocks for each set of columns, and of these along a run
  int rows_per_block;              // more than 1 only where a block takes whole runs
  int run;                         // elements of a run that a block takes
  int columns_at_once, columns_shift, group_shift;  // 2^columns_shift, at most 32; threads of a column, 2^group_shift
  bool vectors;                    // whether threads take 16 bytes at once, then columns_at_once = 1
  // The offset of position q < 2^31 of a block: q · step + row · row_step. Where a block takes whole runs, row = q / run;
  // runs of one element, and parts of a run, do with row = 0, which the magic number 0 makes.
  uint32_t step, row_step;
  Divisor whole_run;
};

// One parameter, [C, ...] or with row = 0 one row for all channels. Absent: data = nullptr, reads as 0.
struct Parameter {
  const void* data = nullptr;
  int64_t row = 0, column = 0;  // strides in elements
  bool is_double = false;
};

// A number as the sum of two of the arithmetic's precision.
template <class A> struct Split {
  A high, low;
};

// What the kernels know of one channel. Its curves are polynomials on cells of the x axis: cell i is centred at i · width,
// of 12 significant bits, so that i · width is exact and x − i · width too.
struct alignas(16) Cells {
  float width, inverse;         // and 1 / width
  float low, high;              // x is clamped to these, far outside
  int first, count;             // the last cell's polynomial is 0, and serves for every x without a cell; count 0: no cells
  int even;                     // whether sums over the even dictionary may be formed by powers: see even.cuh
  float gamma;
};
struct alignas(16) Point {
  float high, low, alpha, unused;  // δ = high + low
};

constexpr int kCoefficients = 8;  // of a polynomial

// f; f′ and f″; q, the derivative of f along v, and q′ (see kaf_math.h); and by γ f, f′ and q.
enum Curve : int { kValue, kSlope, kCurvature, kAlong, kAlongSlope, kByGamma, kSlopeByGamma, kAlongByGamma };

struct Tables {
  Cells* cells;   // [channels]; nullptr where a call makes no tables
  Point* points;  // [channels][D]
  float* rows;    // [channels][count][capacity][kCoefficients]
  int64_t channels;
  int capacity, count;  // cells that there is room for, and curves
  Curve curves[kMaxCurves];
};
KAF_FN int64_t bytes_of(const Tables& t, int size) {  // of a channel
  return sizeof(Cells) + sizeof(Point) * size + sizeof(float) * t.count * t.capacity * kCoefficients;
}

// A parameter's gradient, [rows, size], contiguous.
struct Gradient {
  void* data = nullptr;
  bool is_double = false;
  int slot = -1;  // of the first of its partial sums; -1: not wanted
  int64_t rows = 0, size = 0;
};

// A uniform dictionary, all that does not depend on the channel.
struct Uniform {
  Split<float> step, inverse_step, kappa_by_gamma;  // Δ, 1 / Δ, 2Δ log2 e
};

// ψ[n, m] = γ^(n/2 − m) Σ_{p ≤ m} a_p u^p κ^(n + p)(u), u = √γ (x − δ): a curve of another kernel than the Gaussian, or
// differentiated. With its gradients there are three, of ψ[n, m], ψ[n + 1, m] and ψ[n, m + 1].
struct Psi {
  int kernel, n, m;
  int count;  // of the derivatives of κ, from the n-th, that are needed; 0: the Gaussian itself, which has loops of its own
  float a[3][kHighest / 2 + 2];  // by u^p κ^(n + p); of the second by u^(p − 1) κ^(n + p)
};

struct Call {
  Tiling tiling;
  Parameter alpha, gamma, dictionary, v_alpha, v_gamma, v_dictionary;
  int size;              // D
  double boundary;       // of the uniform dictionary, where there is no other
  Psi psi;
  int base, base_order;  // what lies beneath: base^(base_order), where this is not the operator's own order
  Eulerian eulerian;     // of base_order
  Uniform uniform;
  Tables tables;
  int powers;            // of two that a table of all answers holds; 0: there is none. See answers.cuh
  Divisor windows;       // of points, of which a block forms the sums
  const void *x, *grad, *v_x;
  void *y, *dx, *dgrad;  // nullptr: not wanted
  Gradient dalpha, ddictionary, dgamma;
  void* partial;         // sums, [chunks, columns, slots] in the arithmetic's type
  int slots;
  unsigned* counters;    // [sets of columns, windows]: blocks that have left their sums; the tables' launch puts 0
  bool finishes;         // whether the last of these blocks adds up what all have left; else a second launch does
};

inline int64_t blocks_of(const Tiling& t) {
  return t.chunks.by * ((t.columns + t.columns_at_once - 1) / t.columns_at_once);
}

using Stream = void*;

// The cells that D points need whose bandwidth is at most γΔ² = 0.51 in the mean.
KAF_FN int cells_for(int size) { return static_cast<int>((0.714 * (size - 1) + 8.95) / (0.52 * 1.12)) + 4; }
constexpr size_t kCellBytes = 32 * kCoefficients * sizeof(float);  // in shared memory, with a copy for each lane
// Powers of two that a table of all answers holds, where there is room for so many cells.
inline int powers_for(int capacity) { return 20 + std::bit_width(static_cast<unsigned>(2 * capacity)); }
// Bytes of shared memory that a call's tables take in a block.
inline size_t table_bytes(const Call& call) {
  if (call.powers) return 2 * (128 * call.powers + 2) * sizeof(float);
  return call.tables.count * call.tables.capacity * kCellBytes;
}

Uniform uniform(double boundary, int64_t size);

// Each returns CUDA's error code.
int launch_tables(const Call&, Stream);
int launch_forward(const Call&, Type, Stream);
int launch_backward(const Call&, Type, Stream);
int launch_double_backward(const Call&, Type, Stream);
int launch_reduction(const Call&, Type, Stream);

}  // namespace kaf
