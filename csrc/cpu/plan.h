// What one call computes, as data: the interface between ops.cpp, which fills it in, and the loops, compiled once for
// each instruction set.
//
// Every operator is a few curves evaluated at each x, weighted and added into outputs, and a few sums of data against
// what curves are made of. With ψ[n, m] = ∂ⁿ/∂xⁿ ∂ᵐ/∂γᵐ κ, a polynomial of degree n + 2m times the Gaussian,
//
//     kaf              y   = Σ_k α_k ψ[n, m]
//     kaf_backward     dx  = g Σ_k α_k ψ[n + 1, m]         moments of g
//     double backward  dg  = v f′(x) + q(x)                moments of g and of v g
//                      dx  = v g f″(x) + g q′(x)
//
// with a derivative of a base added to f, f′ and f″ where the KAF has one (Beneath).
//
// The CPU evaluates a curve of Gaussians piecewise. For every channel and curve a table is made: the x axis is cut into
// cells of equal width, and on each the curve is a polynomial, interpolated at Chebyshev points. An element then costs
// a few operations to find its cell and one lookup and one multiply-add for each coefficient, whatever D is. The
// coefficient gradients are the transpose: each element adds w p_m(v), m = 0 … kPoints − 1, with p_m the polynomials
// that curves are written in, to its cell, and the sums are contracted once per channel with the Gaussians at the
// Chebyshev points. docs/cpu-kernels.md has the error analysis. Curves of other kernels pay for every point at every
// element (kernels.inl).
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../kaf_math.h"
#include "isa.h"

// Before loops over arrays of vector registers, which must be unrolled whole to stay in registers.
#ifdef __clang__
#define KAF_UNROLL _Pragma("unroll")
#else
#define KAF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kaf {

enum class Type : uint8_t { f32, f64, bf16, f16 };
KAF_FN int size_of(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

constexpr int kMaxDims = 64;  // as PyTorch

struct alignas(64) Line {  // of the cache: a vector load that crosses two takes twice the time
  char bytes[64];
};

// A tensor [positions, C]: all dimensions but the channel's are merged where strides allow, outermost first.
struct View {
  char* data = nullptr;
  Type type{};
  int64_t channel_stride = 0;  // strides in elements
  int64_t strides[kMaxDims];   // of the position dimensions
  explicit KAF_FN operator bool() const { return data != nullptr; }
};

// The cells that a channel's x axis is cut into. Cell i is centred at i · width; the first and the last are 0.
struct Cells {
  double width = 0;    // has at most 12 significant bits, so that i · width is exact in T and x − i · width too
  int64_t first = 0;   // index of the first cell
  int count = 0;       // 0: no table, sum over the points directly
  bool narrow = true;  // enough for tables of curves to hold the smooth base beneath them
};

// What a product adds to its curve: the derivative, of some order, of a base.
struct Beneath {
  int base = kNoBase, order = 0;
  KAF_FN bool smooth() const { return base == kSilu || base == kGelu; }
};

// One bandwidth, and the cells for it and its dictionary.
struct Basis {
  Cells cells;
  double gamma = 0;
};

// d^q exp(−γ d²) of one dictionary and bandwidth at the Chebyshev points of each cell, where it is not negligible.
struct Windows {
  std::vector<int> begin, end;  // which points, for each cell
  std::vector<int> row;         // the first one's row of values
  std::vector<double> values;   // [sum of windows][order + 1][kPoints], cell by cell
  std::vector<double> base;     // [products][cells][kPoints], coefficients of the bases that tables hold
};

struct Order {  // of differentiation: n times in x and m times in γ
  int n = 0, m = 0;
};

enum Weight : int { kOne, kGrad, kVx, kProduct };  // 1, g, v, v g

struct Product {  // output += weight · (curve(x) + base^(order)(x))
  int output, weight, curve;
  Beneath beneath;
  int64_t own_table = 0;  // offset in Plan::tables of a smooth base's own cells, see BaseTable
};

constexpr int kMaxProducts = 4, kMaxSums = 3, kMaxOutputs = 2;

struct Plan {
  bool float64 = false;  // arithmetic
  int64_t kernel = kGaussian;

  // Geometry: positions = product of sizes.
  int64_t channels = 0, positions = 0;
  int dims = 0;
  int64_t sizes[kMaxDims];

  View x, grad, v_x, outputs[kMaxOutputs];
  int products_count = 0, curves_count = 0, sums_count = 0;
  Product products[kMaxProducts];
  int sums[kMaxSums];  // weights, each to be summed against what curves are made of

  // Parameters, one row per channel.
  int64_t dictionary_size = 0;
  bool shared_basis = false;                 // all channels have the same dictionary and bandwidth
  std::vector<Basis> bases;                  // [C] or, shared, [1]; the loops place the cells
  std::vector<double> points;                // [C, D] or, shared, [1, D]; rows are sorted
  std::vector<int> order;                    // points[r, i] is point order[r, i] of the dictionary

  // Curves: for each point, in the order of `points`, the coefficients of d^0 … d^degree beside κ. That of another
  // kernel than the Gaussian has degree 0 and stands beside ψ[n, m] / γ^(n/2 − m).
  std::vector<double> curves;                // all curves [C, D, degree + 1], one after the other
  int64_t curve_offset[kMaxProducts];
  int curve_degree[kMaxProducts];
  Order curve_order[kMaxProducts];           // of another kernel
  int moment_degree = 0;                     // sums are over d^0 κ … d^degree κ, or
  Order sum_order[kMaxSums];                 // over ψ[n, m] / γ^(n/2 − m) of another kernel

  // Made by the loops.
  bool holds_base = false;                   // whether tables hold smooth bases, except in the first and last cell
  Windows windows;                           // where the basis is shared
  std::vector<double> moments;               // the result: [sums_count, C, D, moment_degree + 1]

  // Rounds: as many channels at a time, [first, last), as have tables and sums in the workspace.
  int64_t first = 0, last = 0;
  std::vector<int64_t> table_offset;         // [C], of a channel's first table
  std::vector<int64_t> sum_offset;           // [C], of a channel's first cell sums
  int64_t sums_size = 0;                     // of one chunk, all channels
  int64_t tables_room = 0, partial_room = 0;
  std::unique_ptr<Line[]> tables;            // of T: [C][curves_count][cells][kPoints], or for permutes [kPoints][32];
                                             // after these, smooth bases in cells of their own
  std::unique_ptr<double[]> partial;         // [chunks][sums_size]

  // Tasks: chunks of positions × blocks of a round's channels, the last of which has all that are left. They are fixed
  // by shapes and cells, so that results do not depend on threads.
  int64_t chunk = 0, chunks = 0, block = 0, blocks = 0;
  bool channels_inner = false;               // channels are innermost in memory
};

// One instruction set's loops. Each handles items [begin, end) and may be called from several threads at once.
struct Loops {
  const char* name;
  void (*make_bases)(Plan&, int64_t begin, int64_t end);                 // rows of bases
  void (*layout)(Plan&);                                                 // of the round that begins with `first`
  void (*make_tables)(Plan&, Windows&, int64_t begin, int64_t end);      // channels; windows are the caller's to hold
  void (*run)(Plan&, int64_t begin, int64_t end);                        // tasks
  void (*contract)(Plan&, Windows&, int64_t begin, int64_t end);         // channels
};

#define X(isa, runs_here) extern const Loops isa##_loops;
KAF_ISAS(X)
#undef X

}  // namespace kaf
