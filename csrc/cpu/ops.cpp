// The CPU kernels of the operators that kafops/ops.py declares: reads tensors into a Plan, runs it, reads the result.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"
#include "plan.h"

namespace kaf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Needs : int64_t { kNeedX = 1, kNeedAlpha = 2, kNeedGamma = 4, kNeedDictionary = 8, kNeedGrad = 16 };

// ------------------------------------------------------------------------------------------------- instruction sets

bool runs_here(const Loops& loops) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&loops == &avx2_loops) return avx2;
  if (&loops == &avx512_loops)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &loops == &portable_loops;
}

// The best that runs here, or the one that KAFOPS_CPU_CAPABILITY names; nullptr and a reason where it cannot.
const Loops* choose_loops(std::string& error) {
  const Loops* all[] = {
#if defined(__x86_64__) && defined(__GNUC__)
      &avx512_loops, &avx2_loops,
#endif
      &portable_loops};
  const char* wanted = std::getenv("KAFOPS_CPU_CAPABILITY");
  std::string names;
  for (const Loops* loops : all) {
    if (!runs_here(*loops)) continue;
    if (!wanted || !*wanted || std::string(wanted) == loops->name) return loops;
    names += (names.empty() ? "" : ", ") + std::string(loops->name);
  }
  error = "KAFOPS_CPU_CAPABILITY=" + std::string(wanted) + " does not run here; this machine runs: " + names;
  return nullptr;
}

const Loops& loops() {
  static std::string error;
  static const Loops* const chosen = choose_loops(error);
  STD_TORCH_CHECK(chosen, error);
  return *chosen;
}

// ----------------------------------------------------------------------------------------------------------- tensors

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// A parameter [rows, columns] or [rows], read to double.
struct Parameter {
  const Tensor* tensor;
  int64_t rows, columns;
  std::vector<double> values;

  Parameter(const Tensor& t, const char* name, int64_t dim) : tensor(&t), rows(0), columns(1) {
    const Type type = type_of(t, name);
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == dim && (type == Type::f32 || type == Type::f64), name, " must be a ", dim,
                    "-dimensional float32 or float64 tensor on the CPU");
    rows = t.size(0);
    if (dim == 2) columns = t.size(1);
    values.resize(rows * columns);
    const int64_t across = t.stride(0), along = dim == 2 ? t.stride(1) : 0;
    const char* data = static_cast<const char*>(t.data_ptr());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t at = r * across + k * along;
        values[r * columns + k] = type == Type::f32 ? reinterpret_cast<const float*>(data)[at]
                                                    : reinterpret_cast<const double*>(data)[at];
      }
  }
  const double* row(int64_t c) const { return values.data() + (rows == 1 ? 0 : c) * columns; }
};

// The arguments that all operators share.
struct Arguments {
  Tensor x;
  Parameter alpha, gamma;
  std::optional<Parameter> dictionary;
  double boundary;
  int64_t channels = 1, d;

  Arguments(const Tensor& x_, const Tensor& alpha_, const Tensor& gamma_, const std::optional<Tensor>& dictionary_,
            double boundary_)
      : x(x_), alpha(alpha_, "alpha", 2), gamma(gamma_, "gamma", 1), boundary(boundary_), d(alpha.columns) {
    if (dictionary_) dictionary.emplace(*dictionary_, "dictionary", 2);
    STD_TORCH_CHECK(d > 0, "alpha must have at least one column");
    STD_TORCH_CHECK(!dictionary || dictionary->columns == d, "dictionary and alpha must have as many columns");
    for (const Parameter* p : {&alpha, &gamma, dictionary ? &*dictionary : nullptr})
      if (p && p->rows != 1) {
        STD_TORCH_CHECK(x.dim() >= 2 && p->rows == x.size(1), "a parameter has ", p->rows,
                        " rows, but x has another number of channels");
        channels = p->rows;
      }
  }

  void read_parameters(Plan& p) const {
    const auto same = [](const Parameter& v) {
      for (int64_t r = 1; r < v.rows; ++r)
        if (!std::equal(v.row(0), v.row(0) + v.columns, v.row(r))) return false;
      return true;
    };
    p.channels = channels;
    p.dictionary_size = d;
    p.shared_basis = channels > 0 && same(gamma) && (!dictionary || same(*dictionary));
    const int64_t rows = p.shared_basis ? 1 : channels;
    p.gamma.resize(rows);
    p.dictionary.resize(rows * d);
    p.bases.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      p.gamma[r] = *gamma.row(r);
      for (int64_t k = 0; k < d; ++k)
        p.dictionary[r * d + k] = dictionary ? dictionary->row(r)[k] : d == 1 ? 0 : boundary * (2.0 * k / (d - 1) - 1);
    }
  }
};

// Adds a curve to the plan and says where its values go.
void add_product(Plan& p, int output, Weight weight, int degree) {
  p.products[p.products_count++] = {output, weight, p.curves_count};
  p.curve_degree[p.curves_count++] = degree;
  p.curves.resize(p.curves_count * p.channels * p.dictionary_size);
}

// Fills the plan's last curve: term(c, k).
template <class F> void set_curve(Plan& p, F term) {
  Term* out = p.curves.data() + (p.curves_count - 1) * p.channels * p.dictionary_size;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t k = 0; k < p.dictionary_size; ++k) *out++ = term(c, k);
}

// Positions are all dimensions but the channel's, in the order in which the output (or x) lies in memory, merged where
// every tensor allows it.
void set_geometry(Plan& p, const Arguments& a, const std::vector<std::pair<View*, const Tensor*>>& tensors) {
  for (const auto& [view, t] : tensors)
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == a.x.dim() &&
                        std::equal(t->sizes().begin(), t->sizes().end(), a.x.sizes().begin()) &&
                        t->scalar_type() == a.x.scalar_type(),
                    "grad and grad_x must be CPU tensors with the shape and dtype of x");
  struct Dim {
    int64_t size;
    std::vector<int64_t> strides;
  };
  std::vector<Dim> dims;
  const int64_t channel = p.channels == 1 ? -1 : 1;
  p.positions = 1;
  for (int64_t i = 0; i < a.x.dim(); ++i) {
    if (i == channel) continue;
    p.positions *= a.x.size(i);
    if (a.x.size(i) == 1) continue;
    Dim dim{a.x.size(i), {}};
    for (const auto& [view, t] : tensors) dim.strides.push_back(t->stride(i));
    dims.push_back(dim);
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& l, const Dim& r) { return l.strides[0] > r.strides[0]; });
  std::vector<Dim> merged;
  for (const Dim& inner : dims) {
    bool fits = !merged.empty();
    for (size_t t = 0; fits && t < tensors.size(); ++t)
      fits = merged.back().strides[t] == inner.strides[t] * inner.size;
    if (fits) {
      merged.back().size *= inner.size;
      merged.back().strides = inner.strides;
    } else {
      merged.push_back(inner);
    }
  }
  if (merged.empty()) merged.push_back({1, std::vector<int64_t>(tensors.size(), 1)});
  p.dims = static_cast<int>(merged.size());
  for (int i = 0; i < p.dims; ++i) p.sizes[i] = merged[i].size;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const auto& [view, tensor] = tensors[t];
    view->data = static_cast<char*>(tensor->data_ptr());
    view->type = type_of(*tensor, "x");
    view->channel_stride = channel < 0 ? 0 : tensor->stride(channel);
    for (int i = 0; i < p.dims; ++i) view->strides[i] = merged[i].strides[t];
  }
  p.float64 = p.x.type == Type::f64;
  // Tasks follow memory: a range of positions, all channels or some of many. Each leaves its own cell sums, so it must be
  // long enough for those not to count; a few at least, for the threads to share.
  p.channels_inner = p.channels > 1 && p.x.channel_stride == 1 && p.x.strides[p.dims - 1] != 1;
  p.block = p.channels_inner ? 32 : 64;
  p.blocks = (p.channels + p.block - 1) / p.block;
  p.chunks = std::clamp<int64_t>(p.positions / 8192, (8 + p.blocks - 1) / p.blocks, 256);
  p.chunks = std::clamp<int64_t>(p.positions / 1024, 1, p.chunks);
  p.chunk = (p.positions + p.chunks - 1) / p.chunks;
}

void execute(Plan& p) {
  using torch::stable::parallel_for;
  const Loops& l = loops();
  const int64_t uses = p.curves_count + p.sums_count;
  if (uses == 0) return;  // nobody asked for anything
  const int64_t channels_at_once = p.shared_basis ? 64 / uses : 4;  // about 20 µs of work
  parallel_for(0, static_cast<int64_t>(p.bases.size()), channels_at_once,
               [&](int64_t b, int64_t e) { l.make_bases(p, b, e); });
  l.layout(p);
  parallel_for(0, p.channels, channels_at_once, [&](int64_t b, int64_t e) { l.make_tables(p, b, e); });
  const int64_t tasks = p.chunks * p.blocks, elements = p.channels * p.positions;
  parallel_for(0, tasks, std::max<int64_t>(1, tasks * 16384 / std::max<int64_t>(elements, 1)),
               [&](int64_t b, int64_t e) { l.run(p, b, e); });
  if (!p.sums_count) return;
  p.moments.resize(p.sums_count * p.channels * p.dictionary_size * (kMaxDegree + 1));
  parallel_for(0, p.channels, channels_at_once, [&](int64_t b, int64_t e) { l.contract(p, b, e); });
}

// Moments of the i-th sum at point k of channel c.
const double* moments(const Plan& p, int i, int64_t c, int64_t k) {
  return p.moments.data() + ((i * p.channels + c) * p.dictionary_size + k) * (kMaxDegree + 1);
}

// A parameter's gradient from value(c, k), added over channels where the parameter's row is shared by all.
template <class F> void write_gradient(const Tensor& out, const Parameter& like, const Plan& p, F value) {
  std::vector<double> sums(like.rows * like.columns);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t k = 0; k < like.columns; ++k) sums[(like.rows == 1 ? 0 : c) * like.columns + k] += value(c, k);
  if (out.scalar_type() == ScalarType::Float) std::copy(sums.begin(), sums.end(), static_cast<float*>(out.data_ptr()));
  else std::copy(sums.begin(), sums.end(), static_cast<double*>(out.data_ptr()));
}

Tensor empty_gradient(const Tensor& like, bool needed) {
  return needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
}
Tensor empty_gradient(const Arguments& a, const std::optional<Tensor>& dictionary, bool needed) {
  return dictionary && needed ? empty_gradient(*dictionary, true) : torch::stable::new_empty(a.x, {0});
}

// --------------------------------------------------------------------------------------------------------- operators

Tensor forward(Tensor x, Tensor alpha, Tensor gamma, std::optional<Tensor> dictionary, double boundary) {
  const Arguments a(x, alpha, gamma, dictionary, boundary);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  Plan p;
  a.read_parameters(p);
  set_geometry(p, a, {{&p.outputs[0], &y}, {&p.x, &x}});
  add_product(p, 0, kOne, 0);
  set_curve(p, [&](int64_t c, int64_t k) { return constant(a.alpha.row(c)[k]); });
  execute(p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor alpha, Tensor gamma,
                                                    std::optional<Tensor> dictionary, double boundary, int64_t needs) {
  const Arguments a(x, alpha, gamma, dictionary, boundary);
  const bool need_dictionary = dictionary && (needs & kNeedDictionary);
  const bool need_sums = needs & (kNeedAlpha | kNeedGamma) || need_dictionary;
  Tensor dx = needs & kNeedX ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dalpha = empty_gradient(alpha, needs & kNeedAlpha), dgamma = empty_gradient(gamma, needs & kNeedGamma);
  Tensor ddictionary = empty_gradient(a, dictionary, need_dictionary);
  Plan p;
  a.read_parameters(p);
  const auto f = [&](int64_t c, int64_t k) { return constant(a.alpha.row(c)[k]); };
  const auto gamma_of = [&](int64_t c) { return *a.gamma.row(c); };
  if (x.numel() > 0) {
    std::vector<std::pair<View*, const Tensor*>> tensors{{&p.x, &x}, {&p.grad, &grad}};
    if (needs & kNeedX) tensors.insert(tensors.begin(), {&p.outputs[0], &dx});
    set_geometry(p, a, tensors);
    if (needs & kNeedX) {
      add_product(p, 0, kGrad, 1);
      set_curve(p, [&](int64_t c, int64_t k) { return d_dx(f(c, k), gamma_of(c)); });
    }
    if (need_sums) p.sums[p.sums_count++] = kGrad;
    p.moment_degree = needs & kNeedGamma ? 2 : need_dictionary ? 1 : 0;
    execute(p);
  } else {
    p.moments.assign(p.channels * p.dictionary_size * (kMaxDegree + 1), 0.0);
  }
  const auto against = [&](int64_t c, int64_t k, const Term& t) { return dot(t, moments(p, 0, c, k)); };
  if (needs & kNeedAlpha)
    write_gradient(dalpha, a.alpha, p, [&](int64_t c, int64_t k) { return against(c, k, constant(1)); });
  if (needs & kNeedGamma)
    write_gradient(dgamma, a.gamma, p, [&](int64_t c, int64_t) {
      double sum = 0;
      for (int64_t k = 0; k < a.d; ++k) sum += against(c, k, d_dgamma(f(c, k)));
      return sum;
    });
  if (need_dictionary)
    write_gradient(ddictionary, *a.dictionary, p,
                   [&](int64_t c, int64_t k) { return against(c, k, -1.0 * d_dx(f(c, k), gamma_of(c))); });
  return {dx, dalpha, dgamma, ddictionary};
}

// Gradients of L = <v_x, dx> + <v_alpha, dalpha> + <v_gamma, dgamma> + <v_dictionary, ddictionary>, which is
// Σ v_x g f′(x) + Σ g q(x) with q = Σ_k (v_alpha_k + v_gamma ∂/∂γ + v_dictionary_k ∂/∂δ_k) f.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    std::optional<Tensor> v_x, std::optional<Tensor> v_alpha, std::optional<Tensor> v_gamma,
    std::optional<Tensor> v_dictionary, Tensor grad, Tensor x, Tensor alpha, Tensor gamma,
    std::optional<Tensor> dictionary, double boundary, int64_t needs) {
  const Arguments a(x, alpha, gamma, dictionary, boundary);
  const bool need_dictionary = dictionary && (needs & kNeedDictionary);
  const bool need_sums = needs & (kNeedAlpha | kNeedGamma) || need_dictionary;
  Tensor dgrad = needs & kNeedGrad ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dx = needs & kNeedX ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dalpha = empty_gradient(alpha, needs & kNeedAlpha), dgamma = empty_gradient(gamma, needs & kNeedGamma);
  Tensor ddictionary = empty_gradient(a, dictionary, need_dictionary);
  Plan p;
  a.read_parameters(p);

  const auto read = [&](const std::optional<Tensor>& v, const Parameter& like, const char* name, int64_t dim) {
    std::optional<Parameter> values;
    if (v) {
      values.emplace(*v, name, dim);
      STD_TORCH_CHECK(values->rows == like.rows && values->columns == like.columns, name, " has the wrong shape");
    }
    return values;
  };
  const auto va = read(v_alpha, a.alpha, "the gradient of alpha's gradient", 2);
  const auto vg = read(v_gamma, a.gamma, "the gradient of gamma's gradient", 1);
  STD_TORCH_CHECK(dictionary || !v_dictionary, "a gradient of the dictionary's gradient needs a dictionary");
  const auto vd = v_dictionary ? read(v_dictionary, *a.dictionary, "the gradient of dictionary's gradient", 2)
                               : std::optional<Parameter>();
  const auto gamma_of = [&](int64_t c) { return *a.gamma.row(c); };
  const auto f = [&](int64_t c, int64_t k) { return constant(a.alpha.row(c)[k]); };
  const auto f1 = [&](int64_t c, int64_t k) { return d_dx(f(c, k), gamma_of(c)); };
  // The derivative of `of`, a term of some curve, along v_gamma and v_dictionary; q is that of f, plus v_alpha's part.
  const auto along = [&](int64_t c, int64_t k, const Term& of) {
    Term t = constant(0);
    if (vg) t = t + *vg->row(c) * d_dgamma(of);
    if (vd) t = t + -vd->row(c)[k] * d_dx(of, gamma_of(c));
    return t;
  };
  const auto q = [&](int64_t c, int64_t k) {
    return along(c, k, f(c, k)) + constant(va ? va->row(c)[k] : 0.0);
  };
  const bool has_q = va || vg || vd;
  const int q_degree = vg ? 2 : vd ? 1 : 0;
  int product_sum = -1, grad_sum = -1;  // which sum holds the moments of v g and of g

  if (x.numel() > 0) {
    std::vector<std::pair<View*, const Tensor*>> tensors;
    if (needs & kNeedGrad) tensors.push_back({&p.outputs[0], &dgrad});
    if (needs & kNeedX) tensors.push_back({&p.outputs[1], &dx});
    tensors.push_back({&p.x, &x});
    if (v_x) tensors.push_back({&p.grad_x, &*v_x});
    if (needs & kNeedX || need_sums) tensors.push_back({&p.grad, &grad});
    set_geometry(p, a, tensors);
    if (needs & kNeedGrad) {
      if (v_x) add_product(p, 0, kGradX, 1), set_curve(p, f1);
      if (has_q || !v_x) add_product(p, 0, kOne, q_degree), set_curve(p, q);
    }
    if (needs & kNeedX) {
      if (v_x)
        add_product(p, 1, kProduct, 2),
            set_curve(p, [&](int64_t c, int64_t k) { return d_dx(f1(c, k), gamma_of(c)); });
      if (has_q || !v_x)
        add_product(p, 1, kGrad, q_degree + 1),
            set_curve(p, [&](int64_t c, int64_t k) { return d_dx(q(c, k), gamma_of(c)); });
    }
    if (need_sums && v_x) p.sums[product_sum = p.sums_count++] = kProduct;
    if (need_sums && has_q) p.sums[grad_sum = p.sums_count++] = kGrad;
    p.moment_degree = kMaxDegree;
    execute(p);
  }

  // Σ_n of v g times a term (of the k-th point) plus Σ_n of g times another.
  const auto against = [&](int64_t c, int64_t k, const Term& with_product, const Term& with_grad) {
    double sum = 0;
    if (product_sum >= 0) sum += dot(with_product, moments(p, product_sum, c, k));
    if (grad_sum >= 0) sum += dot(with_grad, moments(p, grad_sum, c, k));
    return sum;
  };
  if (needs & kNeedAlpha)
    write_gradient(dalpha, a.alpha, p, [&](int64_t c, int64_t k) {
      return against(c, k, d_dx(constant(1), gamma_of(c)), along(c, k, constant(1)));
    });
  if (needs & kNeedGamma)
    write_gradient(dgamma, a.gamma, p, [&](int64_t c, int64_t) {
      double sum = 0;
      for (int64_t k = 0; k < a.d; ++k) {
        const Term fg = d_dgamma(f(c, k));  // derivatives commute: ∂/∂γ of q is q's formula applied to ∂f/∂γ
        sum += against(c, k, d_dx(fg, gamma_of(c)), along(c, k, fg) + d_dgamma(constant(va ? va->row(c)[k] : 0.0)));
      }
      return sum;
    });
  if (need_dictionary)
    write_gradient(ddictionary, *a.dictionary, p, [&](int64_t c, int64_t k) {
      return against(c, k, -1.0 * d_dx(f1(c, k), gamma_of(c)), -1.0 * d_dx(q(c, k), gamma_of(c)));
    });
  return {dgrad, dx, dalpha, dgamma, ddictionary};
}

}  // namespace

const char* instruction_set() { return loops().name; }

}  // namespace kaf

STABLE_TORCH_LIBRARY_IMPL(kafops, CPU, m) {
  m.impl("kaf", TORCH_BOX(&kaf::forward));
  m.impl("kaf_backward", TORCH_BOX(&kaf::backward));
  m.impl("kaf_double_backward", TORCH_BOX(&kaf::double_backward));
}

// The Python module: importing it registers the kernels; capability() names the instruction set in use.
static PyObject* capability(PyObject*, PyObject*) {
  std::string error;
  const kaf::Loops* loops = kaf::choose_loops(error);
  if (loops) return PyUnicode_FromString(loops->name);
  PyErr_SetString(PyExc_ValueError, error.c_str());
  return nullptr;
}

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {{"capability", capability, METH_NOARGS, "Name of the instruction set in use."},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The CPU kernels of kafops.", -1, methods,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
