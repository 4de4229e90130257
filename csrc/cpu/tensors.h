// PyTorch's tensors, as all operators see them: what is refused and in which words, parameters in double, tensors of
// the shape of x as views in a plan.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace kaf {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Needs : int64_t { kNeedX = 1, kNeedAlpha = 2, kNeedGamma = 4, kNeedDictionary = 8, kNeedGrad = 16 };


// ------------------------------------------------------------------------------------------------- words of messages

template <class... Words> std::string joined(const Words&... words) {
  std::ostringstream s;
  (s << ... << words);
  return s.str();
}

// Raises unless the condition holds. PyTorch's own begins its messages with a path on the machine that compiled it.
#define KAF_CHECK(condition, ...)                                     \
  do {                                                                \
    if (!(condition)) throw std::runtime_error(joined(__VA_ARGS__));  \
  } while (false)

std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (const int64_t size : t.sizes()) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

std::string dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(t.scalar_type());
  }
}

std::string device_of(const Tensor& t) {
  const auto device = t.device();
  const std::string type = device.type() == torch::headeronly::DeviceType::CPU    ? "cpu"
                           : device.type() == torch::headeronly::DeviceType::CUDA ? "cuda"
                           : device.type() == torch::headeronly::DeviceType::Meta ? "meta"
                                                                                  : "another device";
  return device.index() < 0 ? type : type + ":" + std::to_string(device.index());
}

std::string described(const Tensor& t) { return shape_of(t) + ", " + dtype_of(t) + ", on " + device_of(t); }

// ------------------------------------------------------------------------------------------------------------ reading

std::optional<Type> type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return std::nullopt;
  }
}

// A parameter [rows, columns] or [rows], read where it lies.
struct Parameter {
  Tensor tensor;
  int64_t rows, columns = 1;

  Parameter(const Tensor& t, const char* name, int64_t dim) : tensor(t) {
    const std::optional<Type> type = type_of(t);
    KAF_CHECK(t.is_cpu() && t.dim() == dim && (type == Type::f32 || type == Type::f64), name,
              " must be a float32 or float64 tensor ", dim == 2 ? "[C, D] or [1, D]" : "[C] or [1]",
              " on the CPU, got ", described(t));
    single_ = type == Type::f32;
    data_ = t.const_data_ptr();
    rows = t.size(0);
    across_ = t.stride(0);
    if (dim == 2) columns = t.size(1), along_ = t.stride(1);
  }

  double at(int64_t c, int64_t k = 0) const {
    const int64_t i = (rows == 1 ? 0 : c) * across_ + k * along_;
    return single_ ? static_cast<const float*>(data_)[i] : static_cast<const double*>(data_)[i];
  }

  bool has_equal_rows() const {
    for (int64_t r = 1; across_ && r < rows; ++r)
      for (int64_t k = 0; k < columns; ++k)
        if (at(r, k) != at(0, k)) return false;
    return true;
  }

 private:
  bool single_;
  const void* data_;
  int64_t across_, along_ = 0;
};

// The arguments that all operators share.
struct Arguments {
  Tensor x;
  Type type;
  Parameter alpha, gamma;
  std::optional<Parameter> dictionary;
  double boundary;
  int64_t kernel, base, channels = 1, d, elements;

  Arguments(const Tensor& x_, const Tensor& alpha_, const Tensor& gamma_, const std::optional<Tensor>& dictionary_,
            double boundary_, int64_t kernel_, int64_t base_)
      : x(x_), alpha(alpha_, "alpha", 2), gamma(gamma_, "gamma", 1), boundary(boundary_), kernel(kernel_), base(base_),
        d(alpha.columns), elements(x.numel()) {
    const std::optional<Type> found = type_of(x);
    KAF_CHECK(found && x.is_cpu(), "x must be a float32, float64, bfloat16 or float16 tensor on the CPU, got ",
              described(x));
    type = *found;
    KAF_CHECK(d > 0, "alpha must have at least one coefficient per channel, got ", shape_of(alpha_));
    if (dictionary_) {
      dictionary.emplace(*dictionary_, "dictionary", 2);
      KAF_CHECK(dictionary->columns == d, "dictionary and alpha must have the same number of points D, got dictionary ",
                shape_of(*dictionary_), " and alpha ", shape_of(alpha_));
    } else {
      KAF_CHECK(0 < boundary && std::isfinite(boundary), "boundary must be a positive finite number, got ", boundary);
    }
    fit("alpha", alpha);
    fit("gamma", gamma);
    if (dictionary) fit("dictionary", *dictionary);
    KAF_CHECK(0 <= kernel && kernel < kKernels, "kernel must be a code from 0 to ", kKernels - 1, ", got ", kernel);
    KAF_CHECK(kNoBase <= base && base <= kGelu, "base must be a code from 0 to ", int{kGelu}, ", got ", base);
  }

  // Raises unless ψ[n, m] is offered. `what` is computed from it.
  void check_order(int64_t n, int64_t m, const char* what) const {
    KAF_CHECK(n >= 0 && m >= 0, "n and m, the orders of differentiation, must not be negative, got n = ", n,
              " and m = ", m);
    KAF_CHECK(n <= kHighest && m <= kHighest && n + 2 * m <= kHighest, "kafops offers derivatives up to n + 2m = ",
              kHighest, ", got n = ", n, " and m = ", m, " for ", what);
    if (kernel == kMatern32 || kernel == kBSpline)
      KAF_CHECK(n + m <= 2, "kernel '", kernel == kMatern32 ? "matern32" : "bspline",
                "' was to be differentiated n = ", n, " times in x or its dictionary and m = ", m,
                " times in gamma, but it has no more than 2 derivatives (n + m ≤ 2), for ", what);
  }

  // Raises unless t, a weight of x's elements, is as x.
  void check_like_x(const Tensor& t, const char* name) const {
    const IntHeaderOnlyArrayRef a = t.sizes(), b = x.sizes();
    KAF_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type() && a.size() == b.size() &&
                  std::equal(a.begin(), a.end(), b.begin()),
              name, " must have the shape, dtype and device of x, ", described(x), ", got ", described(t));
  }

  void read_parameters(Plan& p) const {
    p.kernel = kernel;
    p.channels = channels;
    p.dictionary_size = d;
    p.shared_basis = channels > 0 && gamma.has_equal_rows() && (!dictionary || dictionary->has_equal_rows());
    const int64_t rows = p.shared_basis ? 1 : channels;
    p.bases.resize(rows);
    p.points.resize(rows * d);
    p.order.resize(rows * d);
    for (int64_t r = 0; r < rows; ++r) {
      p.bases[r].gamma = gamma.at(r);
      double* points = p.points.data() + r * d;
      int* order = p.order.data() + r * d;
      bool sorted = true;  // or not to be sorted, as there is a NaN: then nothing is made of them
      const auto point = [&](int64_t k) {
        return dictionary ? dictionary->at(r, k) : d == 1 ? 0 : boundary * (2.0 * k / (d - 1) - 1);
      };
      for (int64_t k = 0; k < d; ++k) {
        order[k] = static_cast<int>(k);
        points[k] = point(k);
        if (k > 0 && points[k] < points[k - 1]) sorted = false;
      }
      if (sorted || std::any_of(points, points + d, [](double v) { return v != v; })) continue;
      std::sort(order, order + d, [&](int i, int j) { return point(i) < point(j); });
      for (int64_t i = 0; i < d; ++i) points[i] = point(order[i]);
    }
  }

 private:
  void fit(const char* name, const Parameter& p) {
    if (p.rows == 1) return;
    KAF_CHECK(x.dim() >= 2 && p.rows == x.size(1), name,
              " must have one row per channel of x (dimension 1) or a single row, got ", name, " ", shape_of(p.tensor),
              " for x ", shape_of(x));
    channels = p.rows;
  }
};

// ------------------------------------------------------------------------------------------------------------ making

Tensor empty(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, const Tensor& like) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// A tensor of the shape, dtype and layout of x, or an empty one where it is not needed. PyTorch's own function costs as
// much as all else in a small call.
Tensor empty_like_x(const Tensor& x, bool needed = true) {
  constexpr int64_t none = 0, one = 1;
  if (!needed) return empty({&none, 1}, {&one, 1}, x);
  return x.is_contiguous() ? empty(x.sizes(), x.strides(), x) : torch::stable::empty_like(x);
}

// A contiguous tensor of the shape and dtype of a parameter, or an empty one where it is not needed.
Tensor empty_gradient(const Tensor& parameter, bool needed) {
  if (!needed) return empty_like_x(parameter, false);
  const IntHeaderOnlyArrayRef sizes = parameter.sizes();
  const int64_t strides[2] = {sizes.size() == 2 ? std::max<int64_t>(sizes[1], 1) : 1, 1};
  return empty(sizes, {strides, sizes.size()}, parameter);
}

// ---------------------------------------------------------------------------------------------------------- geometry

struct Bound {  // a tensor of the shape of x, and the view that it becomes
  View* view;
  const Tensor* tensor;
};

// Positions are all dimensions but the channel's, in the order in which the first tensor lies in memory, merged where
// every tensor allows it.
template <int Count> void set_geometry(Plan& p, const Arguments& a, const Bound (&bound)[Count], int count = Count) {
  struct Dim {
    int64_t size, strides[Count];
  };
  Dim dims[kMaxDims];
  const int64_t* strides[Count];
  for (int t = 0; t < count; ++t) strides[t] = bound[t].tensor->strides().data();
  const IntHeaderOnlyArrayRef shape = a.x.sizes();
  const int64_t channel = p.channels == 1 ? -1 : 1;
  int found = 0;
  p.positions = 1;
  for (int64_t i = 0; i < static_cast<int64_t>(shape.size()); ++i) {
    if (i == channel) continue;
    p.positions *= shape[i];
    if (shape[i] == 1) continue;
    Dim dim{shape[i], {}};
    for (int t = 0; t < count; ++t) dim.strides[t] = strides[t][i];
    int at = found++;
    for (; at > 0 && dims[at - 1].strides[0] < dim.strides[0]; --at) dims[at] = dims[at - 1];  // outermost first
    dims[at] = dim;
  }
  p.dims = 0;
  for (int i = 0; i < found; ++i) {
    bool fits = p.dims > 0;
    for (int t = 0; fits && t < count; ++t)
      fits = bound[t].view->strides[p.dims - 1] == dims[i].strides[t] * dims[i].size;
    if (!fits) p.sizes[p.dims++] = 1;
    p.sizes[p.dims - 1] *= dims[i].size;
    for (int t = 0; t < count; ++t) bound[t].view->strides[p.dims - 1] = dims[i].strides[t];
  }
  if (p.dims == 0) {
    p.sizes[p.dims++] = 1;
    for (int t = 0; t < count; ++t) bound[t].view->strides[0] = 1;
  }
  for (int t = 0; t < count; ++t) {
    View& view = *bound[t].view;
    view.data = static_cast<char*>(bound[t].tensor->data_ptr());
    view.type = a.type;
    view.channel_stride = channel < 0 ? 0 : strides[t][channel];
  }
  p.float64 = a.type == Type::f64;
  p.channels_inner = p.channels > 1 && p.x.channel_stride == 1 && p.x.strides[p.dims - 1] != 1;
}

}  // namespace
}  // namespace kaf
