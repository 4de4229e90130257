// What one launch computes, as data: filled in by ops.cpp, read by the kernels. No device code, no torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../kaf_math.h"

namespace kaf {

constexpr int kThreads = 128;  // of every block
constexpr int kMaxFastSize = 160;  // D; larger dictionaries take the direct path

enum class Type : uint8_t { f32, f64, bf16, f16 };

// Who computes which elements: see tiles.cuh.
struct Tiling {
  int64_t rows, pitch, inner, columns, columns_per_channel;
  int64_t row_blocks, run_blocks;  // blocks along the rows and along a run, for each set of columns
  int rows_per_block;              // more than 1 only where a block takes whole runs
  int run;                         // elements of a run that a block takes
  int columns_at_once;             // a power of two, at most 32
  bool vectors;                    // whether threads take 16 bytes at once, then columns_at_once = 1
  // The offset of position q < 2^31 of a block: q · step + row · row_step, with row = mulhi(q, run_magic) >> run_shift.
  // Where a block takes whole runs that is q / run; runs of one element, and parts of a run, do with row = 0.
  uint32_t step, row_step, run_magic;
  int run_shift;
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

// A uniform dictionary, all that does not depend on the channel.
struct Uniform {
  float step;                   // Δ
  Split<float> inverse_step;    // 1 / Δ
  Split<float> kappa_by_gamma;  // 2Δ log2 e
  Split<float> t_by_gamma;      // Δ² log2 e
};

struct Call {
  Tiling tiling;
  Parameter alpha, gamma, dictionary, v_alpha, v_gamma, v_dictionary;
  int size;              // D
  double boundary;       // of the uniform dictionary, where there is no other
  Uniform uniform;
  bool fast;             // whether the fast path may be taken
  const void *x, *grad, *v_x;
  void *y, *dx, *dgrad;  // nullptr: not wanted
  void* partial;         // [chunks, columns, slots] in the arithmetic's type
  int slots;
  int alpha_slot, dictionary_slot, gamma_slot;  // of the partial sums; -1: not wanted
};

// The second stage: partial sums to the gradients of parameters.
struct Gradient {
  void* data;
  bool is_double;
  int slot;
  int64_t rows, size;
};
struct Reduction {
  const void* partial;
  bool is_double;
  int64_t chunks, columns, columns_per_channel;
  int slots;
  int count;
  Gradient gradients[3];
};

KAF_FN int64_t chunks_of(const Tiling& t) { return t.row_blocks * t.run_blocks; }
KAF_FN int64_t blocks_of(const Tiling& t) {
  return chunks_of(t) * ((t.columns + t.columns_at_once - 1) / t.columns_at_once);
}

using Stream = void*;

Uniform uniform(double boundary, int64_t size);

// Each returns CUDA's error code.
int launch_forward(const Call&, Type, Stream);
int launch_backward(const Call&, Type, Stream);
int launch_double_backward(const Call&, Type, Stream);
int launch_reduction(const Reduction&, Stream);

}  // namespace kaf
