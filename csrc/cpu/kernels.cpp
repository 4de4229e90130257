// The CPU kernels of the operators that kafops/kernel_sums.py declares: curves of a kernel other than the Gaussian, and
// their transpose. With u = √γ (x − δ_d), for a power p and an order o of differentiation,
//
//     kernel_sum       y_n = w_n Σ_d a_d u^p κ^(o)(u)
//     kernel_moments   m_d = Σ_n w_n u^p κ^(o)(u)
//
// Each element pays D kernel values, but no tensor of N × D of them exists: rows of a channel's elements are copied, as
// float or double, to tiles that stay in the cache, and the loops over them are left to the compiler to vectorise.
// GCC does not vectorise a choice between two values while it thinks that computing either could trap. Before all
// headers, as a function without this option is not inlined into one that has it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "kernels.h"

namespace kaf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 512;         // elements of one channel handled at a time
constexpr int kLanes = 32;         // partial sums of a tile; divides kTile
constexpr int64_t kChunk = 8192;   // elements whose sums are one number, fixed so that results do not depend on threads
constexpr int64_t kGrain = 65536;  // kernel values that are worth a thread

// --------------------------------------------------------------------------------------------------------- the loops

// One channel's dictionary: a_d, and δ_d as the sum of two T.
template <class T> struct Points {
  int64_t count;
  T root;  // √γ
  std::vector<T> a, high, low;
};

// Elements x, |x| ≤ kFar, their weights, and y; a multiple of kLanes of them.
template <class T> struct Tile {
  alignas(64) T x[kTile], w[kTile], y[kTile];
};

template <class T> using CurveLoop = void (*)(Tile<T>&, int64_t, const Points<T>&);
template <class T> using MomentsLoop = void (*)(const Tile<T>&, int64_t, const Points<T>&, double*);

template <class T, int K, int P, int O> KAF_FN void curve(Tile<T>& t, int64_t n, const Points<T>& points) {
  for (int64_t i = 0; i < n; ++i) t.y[i] = 0;
  for (int64_t d = 0; d < points.count; ++d) {
    const T a = points.a[d], high = points.high[d], low = points.low[d], root = points.root;
    for (int64_t i = 0; i < n; ++i) t.y[i] += a * kernel_term<K, P, O>(root * ((t.x[i] - high) - low));
  }
  for (int64_t i = 0; i < n; ++i) t.y[i] *= t.w[i];
}

template <class T, int K, int P, int O>
KAF_FN void moments(const Tile<T>& t, int64_t n, const Points<T>& points, double* sums) {
  for (int64_t d = 0; d < points.count; ++d) {
    const T high = points.high[d], low = points.low[d], root = points.root;
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes)
      for (int l = 0; l < kLanes; ++l)
        lanes[l] += t.w[i + l] * kernel_term<K, P, O>(root * ((t.x[i + l] - high) - low));
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    sums[d] += sum;
  }
}

// The loops compiled for one instruction set.
#define KAF_INSTRUCTION_SET(name, ...)                                                                      \
  struct name {                                                                                             \
    template <class T, int K, int P, int O>                                                                 \
    __VA_ARGS__ static void curve_loop(Tile<T>& t, int64_t n, const Points<T>& p) {                         \
      curve<T, K, P, O>(t, n, p);                                                                           \
    }                                                                                                       \
    template <class T, int K, int P, int O>                                                                 \
    __VA_ARGS__ static void moments_loop(const Tile<T>& t, int64_t n, const Points<T>& p, double* sums) {   \
      moments<T, K, P, O>(t, n, p, sums);                                                                   \
    }                                                                                                       \
  };
KAF_INSTRUCTION_SET(Portable)
#if defined(__x86_64__) && defined(__GNUC__)
KAF_INSTRUCTION_SET(Avx2, __attribute__((target("avx2,fma"))))
KAF_INSTRUCTION_SET(Avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#undef KAF_INSTRUCTION_SET

template <class T> struct LoopPair {
  CurveLoop<T> curve;
  MomentsLoop<T> moments;
};

template <class Isa, class T, int K> LoopPair<T> choose_order(int64_t power, int64_t order) {
  static constexpr LoopPair<T> all[] = {
      {Isa::template curve_loop<T, K, 0, 0>, Isa::template moments_loop<T, K, 0, 0>},
      {Isa::template curve_loop<T, K, 0, 1>, Isa::template moments_loop<T, K, 0, 1>},
      {Isa::template curve_loop<T, K, 1, 1>, Isa::template moments_loop<T, K, 1, 1>},
      {Isa::template curve_loop<T, K, 0, 2>, Isa::template moments_loop<T, K, 0, 2>},
      {Isa::template curve_loop<T, K, 1, 2>, Isa::template moments_loop<T, K, 1, 2>},
      {Isa::template curve_loop<T, K, 2, 2>, Isa::template moments_loop<T, K, 2, 2>},
  };
  return all[order * (order + 1) / 2 + power];
}

template <class Isa, class T> LoopPair<T> choose_kernel(int64_t kernel, int64_t power, int64_t order) {
  if (kernel == kRationalQuadratic) return choose_order<Isa, T, kRationalQuadratic>(power, order);
  if (kernel == kMatern32) return choose_order<Isa, T, kMatern32>(power, order);
  return choose_order<Isa, T, kBSpline>(power, order);
}

template <class T> LoopPair<T> choose(int64_t kernel, int64_t power, int64_t order) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (std::strcmp(instruction_set(), "avx512") == 0) return choose_kernel<Avx512, T>(kernel, power, order);
  if (std::strcmp(instruction_set(), "avx2") == 0) return choose_kernel<Avx2, T>(kernel, power, order);
#endif
  return choose_kernel<Portable, T>(kernel, power, order);
}

// ----------------------------------------------------------------------------------------------------------- tensors

// A parameter [rows, columns] or [rows], read to double.
struct Parameter {
  int64_t rows, columns;
  std::vector<double> values;

  Parameter(const Tensor& t, const char* name, int64_t dim) {
    const bool single = t.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == dim && (single || t.scalar_type() == ScalarType::Double), name,
                    " must be a ", dim, "-dimensional float32 or float64 tensor on the CPU");
    rows = t.size(0), columns = dim == 2 ? t.size(1) : 1;
    const int64_t across = t.stride(0), along = dim == 2 ? t.stride(1) : 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t at = r * across + k * along;
        values.push_back(single ? static_cast<const float*>(t.data_ptr())[at]
                                : static_cast<const double*>(t.data_ptr())[at]);
      }
  }
  const double* row(int64_t c) const { return values.data() + (rows == 1 ? 0 : c) * columns; }
};

struct View {
  char* data;
  ScalarType type;
  int64_t channel_stride;
  std::vector<int64_t> strides;  // of the positions' dimensions
};

// Calls f(p) with the tensor's data as a pointer to its type.
template <class F> void with_pointer(const View& v, F f) {
  switch (v.type) {
    case ScalarType::Float: return f(reinterpret_cast<float*>(v.data));
    case ScalarType::Double: return f(reinterpret_cast<double*>(v.data));
    case ScalarType::BFloat16: return f(reinterpret_cast<c10::BFloat16*>(v.data));
    default: return f(reinterpret_cast<c10::Half*>(v.data));
  }
}

// Tensors of the shape of x as rows of positions, one row for each channel: positions are all dimensions but the
// channel's, in the order in which x lies in memory, merged where every tensor allows it.
struct Rows {
  int64_t channels, positions = 1;
  std::vector<int64_t> sizes;
  std::vector<View> views;

  Rows(const std::vector<const Tensor*>& tensors, int64_t channels_) : channels(channels_) {
    const Tensor& x = *tensors[0];
    const int64_t channel = channels == 1 ? -1 : 1;
    std::vector<int64_t> dims;
    for (int64_t i = 0; i < x.dim(); ++i) {
      if (i == channel) continue;
      positions *= x.size(i);
      if (x.size(i) != 1) dims.push_back(i);
    }
    std::stable_sort(dims.begin(), dims.end(), [&](int64_t l, int64_t r) { return x.stride(l) > x.stride(r); });
    for (const Tensor* t : tensors) {
      STD_TORCH_CHECK(t->is_cpu() && t->dim() == x.dim() &&
                          std::equal(t->sizes().begin(), t->sizes().end(), x.sizes().begin()),
                      "weight must be a CPU tensor with the shape of x");
      const ScalarType type = t->scalar_type();
      STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                          type == ScalarType::Half,
                      "x and weight must be float32, float64, bfloat16 or float16");
      views.push_back({static_cast<char*>(t->data_ptr()), t->scalar_type(), channel < 0 ? 0 : t->stride(channel), {}});
    }
    for (const int64_t i : dims) {
      bool fits = !sizes.empty();
      for (size_t t = 0; fits && t < tensors.size(); ++t)
        fits = views[t].strides.back() == tensors[t]->stride(i) * x.size(i);
      if (!fits) sizes.push_back(1);
      sizes.back() *= x.size(i);
      for (size_t t = 0; t < tensors.size(); ++t) {
        if (!fits) views[t].strides.push_back(0);
        views[t].strides.back() = tensors[t]->stride(i);
      }
    }
    if (!sizes.empty()) return;
    sizes.push_back(1);
    for (View& v : views) v.strides.push_back(1);
  }

  // Calls f(pointer, stride, index, length) for each stretch of positions [at, at + n) along the innermost dimension.
  template <class F> void for_runs(const View& v, int64_t c, int64_t at, int64_t n, F f) const {
    const int inner = static_cast<int>(sizes.size()) - 1;
    for (int64_t done = 0; done < n;) {
      int64_t offset = c * v.channel_stride, rest = at + done;
      const int64_t length = std::min(n - done, sizes[inner] - rest % sizes[inner]);
      for (int i = inner; i >= 0; --i) {
        offset += rest % sizes[i] * v.strides[i];
        rest /= sizes[i];
      }
      with_pointer(v, [&](auto* p) { f(p + offset, v.strides[inner], done, length); });
      done += length;
    }
  }

  template <class T> void load(const View& v, int64_t c, int64_t at, int64_t n, T* out) const {
    for_runs(v, c, at, n, [&](auto* p, int64_t stride, int64_t index, int64_t length) {
      for (int64_t i = 0; i < length; ++i) out[index + i] = static_cast<T>(p[i * stride]);
    });
  }

  template <class T> void store(const View& v, int64_t c, int64_t at, int64_t n, const T* in) const {
    for_runs(v, c, at, n, [&](auto* p, int64_t stride, int64_t index, int64_t length) {
      for (int64_t i = 0; i < length; ++i) p[i * stride] = in[index + i];
    });
  }

  // Fills x and w of a tile, and returns its length with the padding. An infinite x has the weight 0, and a NaN passes
  // its own on.
  template <class T> int64_t fill(Tile<T>& t, const View* weight, int64_t c, int64_t at, int64_t n) const {
    constexpr T most = std::numeric_limits<T>::max(), far = 1e18;  // whose square is finite
    load(views[0], c, at, n, t.x);
    if (weight) load(*weight, c, at, n, t.w);
    else std::fill(t.w, t.w + n, T(1));
    for (int64_t i = 0; i < n; ++i) {
      const T x = t.x[i];
      if (!(std::fabs(x) <= most)) t.w[i] = x != x ? x : T(0) * t.w[i];
      t.x[i] = x != x ? T(0) : std::clamp(x, -far, far);
    }
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(t.x + n, t.x + padded, T(0));
    std::fill(t.w + n, t.w + padded, T(0));
    return padded;
  }
};

// The arguments that both operators share.
struct Arguments {
  Parameter gamma, dictionary;
  int64_t d, channels = 1;

  Arguments(const Tensor& x, const Tensor& gamma_, const Tensor& dictionary_, const Parameter* coefficients,
            int64_t power, int64_t order, int64_t kernel)
      : gamma(gamma_, "gamma", 1), dictionary(dictionary_, "dictionary", 2), d(dictionary.columns) {
    STD_TORCH_CHECK(d > 0, "dictionary must have at least one column");
    STD_TORCH_CHECK(!coefficients || coefficients->columns == d,
                    "coefficients and dictionary must have as many columns");
    STD_TORCH_CHECK(kRationalQuadratic <= kernel && kernel <= kBSpline, "there is no kernel ", kernel);
    STD_TORCH_CHECK(0 <= power && power <= order && order <= 2, "power and order must be 0 ≤ power ≤ order ≤ 2, got ",
                    power, " and ", order);
    for (const Parameter* p : std::initializer_list<const Parameter*>{&gamma, &dictionary, coefficients})
      if (p && p->rows != 1) {
        STD_TORCH_CHECK(x.dim() >= 2 && p->rows == x.size(1), "a parameter has ", p->rows,
                        " rows, but x has another number of channels");
        channels = p->rows;
      }
  }

  template <class T> void read(int64_t c, const Parameter* coefficients, Points<T>& p) const {
    p.count = d;
    p.root = static_cast<T>(std::sqrt(*gamma.row(c)));
    p.a.resize(d), p.high.resize(d), p.low.resize(d);
    for (int64_t k = 0; k < d; ++k) {
      const double point = dictionary.row(c)[k];
      p.a[k] = coefficients ? static_cast<T>(coefficients->row(c)[k]) : T(0);
      p.high[k] = static_cast<T>(point);
      p.low[k] = static_cast<T>(point - p.high[k]);
    }
  }
};

// Calls f(channel, chunk, begin, end) for ranges of positions of each channel, in parallel.
template <class F> void for_chunks(const Rows& rows, int64_t d, F f) {
  const int64_t chunks = (rows.positions + kChunk - 1) / kChunk, longest = std::min(rows.positions, kChunk);
  torch::stable::parallel_for(0, rows.channels * chunks, std::max<int64_t>(1, kGrain / (longest * d)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t task = begin; task < end; ++task) {
                                  const int64_t chunk = task % chunks, at = chunk * kChunk;
                                  f(task / chunks, chunk, at, std::min(at + kChunk, rows.positions));
                                }
                              });
}

// --------------------------------------------------------------------------------------------------------- operators

template <class T>
void run_sum(const Rows& rows, const View* weight, const View& y, const Arguments& a, const Parameter& coefficients,
             CurveLoop<T> loop) {
  for_chunks(rows, a.d, [&](int64_t c, int64_t, int64_t begin, int64_t end) {
    Tile<T> tile;
    Points<T> points;
    a.read(c, &coefficients, points);
    for (int64_t at = begin, n; at < end; at += n) {
      n = std::min<int64_t>(end - at, kTile);
      loop(tile, rows.fill(tile, weight, c, at, n), points);
      rows.store(y, c, at, n, tile.y);
    }
  });
}

Tensor kernel_sum(Tensor x, std::optional<Tensor> weight, Tensor coefficients_, Tensor gamma, Tensor dictionary,
                  int64_t power, int64_t order, int64_t kernel) {
  const Parameter coefficients(coefficients_, "coefficients", 2);
  const Arguments a(x, gamma, dictionary, &coefficients, power, order, kernel);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  std::vector<const Tensor*> tensors{&x, &y};
  if (weight) tensors.push_back(&*weight);
  const Rows rows(tensors, a.channels);
  const View* w = weight ? &rows.views[2] : nullptr;
  if (x.scalar_type() == ScalarType::Double)
    run_sum(rows, w, rows.views[1], a, coefficients, choose<double>(kernel, power, order).curve);
  else run_sum(rows, w, rows.views[1], a, coefficients, choose<float>(kernel, power, order).curve);
  return y;
}

template <class T>
void run_moments(const Rows& rows, const Arguments& a, MomentsLoop<T> loop, double* out) {
  const int64_t chunks = (rows.positions + kChunk - 1) / kChunk, size = rows.channels * a.d;
  std::vector<double> partial(chunks * size);
  for_chunks(rows, a.d, [&](int64_t c, int64_t chunk, int64_t begin, int64_t end) {
    Tile<T> tile;
    Points<T> points;
    a.read(c, nullptr, points);
    for (int64_t at = begin, n; at < end; at += n) {
      n = std::min<int64_t>(end - at, kTile);
      loop(tile, rows.fill(tile, &rows.views[1], c, at, n), points, partial.data() + chunk * size + c * a.d);
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) out[i] += partial[chunk * size + i];
}

Tensor kernel_moments(Tensor x, Tensor weight, Tensor gamma, Tensor dictionary, int64_t power, int64_t order,
                      int64_t kernel) {
  const Arguments a(x, gamma, dictionary, nullptr, power, order, kernel);
  Tensor sums = torch::stable::new_empty(x, {a.channels, a.d}, ScalarType::Double);
  double* out = static_cast<double*>(sums.data_ptr());
  std::fill(out, out + a.channels * a.d, 0.0);
  if (x.numel() == 0) return sums;
  const Rows rows({&x, &weight}, a.channels);
  if (x.scalar_type() == ScalarType::Double) run_moments(rows, a, choose<double>(kernel, power, order).moments, out);
  else run_moments(rows, a, choose<float>(kernel, power, order).moments, out);
  return sums;
}

}  // namespace
}  // namespace kaf

STABLE_TORCH_LIBRARY_IMPL(kafops, CPU, m) {
  m.impl("kernel_sum", TORCH_BOX(&kaf::kernel_sum));
  m.impl("kernel_moments", TORCH_BOX(&kaf::kernel_moments));
}
