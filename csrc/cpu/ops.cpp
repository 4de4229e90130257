// The operators of kafops/schemas.inc on the CPU: reads tensors into a Plan, runs it, reads the result.
#include <cstdlib>
#include <tuple>

#include "tensors.h"

namespace kaf {
namespace {

// ------------------------------------------------------------------------------------------------- instruction sets

struct Choice {
  const Loops* loops = nullptr;
  std::string error;  // where there are none
};

// The best loops that run here, or those that KAFOPS_CPU_CAPABILITY names. Decided once.
const Choice& choice() {
  static const Choice chosen = [] {
#ifdef KAF_HAS
    __builtin_cpu_init();
#endif
    const char* wanted = std::getenv("KAFOPS_CPU_CAPABILITY");
    std::string names;
    const Loops* found = nullptr;
#define X(isa, runs_here)                                                         \
  if (runs_here) {                                                                \
    names += (names.empty() ? "" : ", ") + std::string(#isa);                     \
    if (!found && (!wanted || !*wanted || std::string(wanted) == #isa)) found = &isa##_loops; \
  }
    KAF_ISAS(X)
#undef X
    if (found) return Choice{found, ""};
    return Choice{nullptr, "KAFOPS_CPU_CAPABILITY=" + std::string(wanted) +
                               " does not run here; this machine runs: " + names};
  }();
  return chosen;
}

const Loops& loops() {
  KAF_CHECK(choice().loops, choice().error);
  return *choice().loops;
}

// ------------------------------------------------------------------------------------------------------------- plans

// Terms of ψ[n, m], one for each channel's bandwidth: α times it is a curve's term, and its sum against moments of data
// is a sum over ψ[n, m]. That of another kernel than the Gaussian is the factor that its loops leave out.
class Psi {
 public:
  Psi(const Arguments& a, int n, int m) : order{n, m}, terms_(a.gamma.rows) {
    for (int64_t r = 0; r < a.gamma.rows; ++r) {
      const double gamma = a.gamma.at(r);
      Term& t = terms_[r];
      if (a.kernel != kGaussian) {
        t = constant(std::pow(gamma, 0.5 * n - m));
        continue;
      }
      t = constant(1);
      for (int i = 0; i < m; ++i) t = d_dgamma(t);
      for (int i = 0; i < n; ++i) t = d_dx(t, gamma);
    }
  }
  const Term& operator()(int64_t c) const { return terms_[terms_.size() == 1 ? 0 : c]; }
  int degree() const { return terms_[0].degree; }

  const Order order;

 private:
  std::vector<Term> terms_;
};

// Adds a curve to the plan, says where its values go, and calls write(c, k, where) for the coefficients of each point.
template <class F> void add_curve(Plan& p, int output, Weight weight, int degree, Order order, F write) {
  const int curve = p.curves_count++;
  p.products[p.products_count++] = {output, weight, curve};
  p.curve_degree[curve] = degree;
  p.curve_order[curve] = order;
  p.curve_offset[curve] = static_cast<int64_t>(p.curves.size());
  const int64_t d = p.dictionary_size;
  p.curves.resize(p.curves.size() + p.channels * d * (degree + 1));
  double* out = p.curves.data() + p.curve_offset[curve];
  for (int64_t c = 0; c < p.channels; ++c) {
    const int* places = p.order.data() + (p.shared_basis ? 0 : c) * d;
    for (int64_t i = 0; i < d; ++i, out += degree + 1) write(c, places[i], out);
  }
}

// Adds the curve Σ_k α_k ψ.
void add_curve(Plan& p, int output, Weight weight, const Arguments& a, const Psi& psi) {
  const int degree = psi.degree();
  add_curve(p, output, weight, degree, psi.order, [&](int64_t c, int64_t k, double* out) {
    const double alpha = a.alpha.at(c, k), *factors = psi(c).p;
    for (int q = 0; q <= degree; ++q) out[q] = alpha * factors[q];
  });
}

// Adds the curve of Gaussians with term(c, k), of that degree at most.
template <class F> void add_curve_of(Plan& p, int output, Weight weight, int degree, F term) {
  add_curve(p, output, weight, degree, {}, [&](int64_t c, int64_t k, double* out) {
    const Term t = term(c, k);
    for (int q = 0; q <= degree; ++q) out[q] = coefficient(t, q);
  });
}

// Puts the base, differentiated as the curve, beneath the last curve: base^(n), or nothing where that was by γ.
void put_beneath(Plan& p, const Arguments& a, int64_t n, int64_t m) {
  if (m == 0) p.products[p.products_count - 1].beneath = {static_cast<int>(a.base), static_cast<int>(n)};
}

// Adds a sum of data, weighted, over ψ and returns its number. The Gaussian's ψ have their sums in common.
int add_sum(Plan& p, Weight weight, const Psi& psi) {
  p.moment_degree = std::max(p.moment_degree, psi.degree());
  if (p.kernel == kGaussian && p.sums_count) return 0;
  p.sum_order[p.sums_count] = psi.order;
  p.sums[p.sums_count] = weight;
  return p.sums_count++;
}

// f(begin, end) for parts of [0, end), on several threads where a part is worth one.
template <class F> void in_parallel(int64_t end, int64_t grain, const F& f) {
  if (end <= grain) return f(0, end);
  torch::stable::parallel_for(0, end, grain, f);
}

void execute(Plan& p) {
  const Loops& l = loops();
  const int64_t uses = p.curves_count + p.sums_count;
  if (uses == 0) return;  // nobody asked for anything
  const int64_t channels_at_once = p.shared_basis ? 16 / uses : 1;  // about 5 µs of work
  in_parallel(static_cast<int64_t>(p.bases.size()), channels_at_once,
              [&](int64_t b, int64_t e) { l.make_bases(p, b, e); });
  if (p.sums_count) p.moments.resize(p.sums_count * p.channels * p.dictionary_size * (p.moment_degree + 1));
  const auto by_channels = [&](const auto& f) {
    in_parallel(p.last - p.first, channels_at_once, [&](int64_t b, int64_t e) {
      Windows windows;
      f(p, windows, p.first + b, p.first + e);
    });
  };
  for (; p.first < p.channels; p.first = p.last) {
    l.layout(p);
    if (p.curves_count) by_channels(l.make_tables);
    // About 4096 elements, or as many kernel values by another kernel, are worth a thread.
    const int64_t tasks = p.chunks * p.blocks, each = p.kernel == kGaussian ? 1 : p.dictionary_size;
    const int64_t work = std::max<int64_t>((p.last - p.first) * p.positions * each, 1);
    in_parallel(tasks, std::max<int64_t>(1, tasks * 4096 / work), [&](int64_t b, int64_t e) { l.run(p, b, e); });
    if (p.sums_count) by_channels(l.contract);
  }
}

// The i-th sum over a term at point k of channel c.
double sum_over(const Plan& p, int i, int64_t c, int64_t k, const Term& t) {
  return dot(t, p.moments.data() + ((i * p.channels + c) * p.dictionary_size + k) * (p.moment_degree + 1));
}

void write_zero(const Tensor& out) {
  std::memset(out.mutable_data_ptr(), 0, out.numel() * size_of(*type_of(out)));
}

// A parameter's gradient from value(c, k), added over channels where the parameter's row is shared by all.
template <class F> void write_gradient(const Tensor& out, const Parameter& like, int64_t channels, F value) {
  const auto write = [&](auto* to) {
    for (int64_t r = 0; r < like.rows; ++r)
      for (int64_t k = 0; k < like.columns; ++k) {
        double sum = 0;
        for (int64_t c = like.rows == 1 ? 0 : r; c < (like.rows == 1 ? channels : r + 1); ++c) sum += value(c, k);
        *to++ = static_cast<std::remove_reference_t<decltype(*to)>>(sum);
      }
  };
  if (out.scalar_type() == ScalarType::Float) write(static_cast<float*>(out.mutable_data_ptr()));
  else write(static_cast<double*>(out.mutable_data_ptr()));
}

// --------------------------------------------------------------------------------------------------------- operators

Tensor forward(const Tensor& x, const Tensor& alpha, const Tensor& gamma, const std::optional<Tensor>& dictionary,
               double boundary, int64_t kernel, int64_t base, int64_t n, int64_t m) {
  const Arguments a(x, alpha, gamma, dictionary, boundary, kernel, base);
  a.check_order(n, m, "the curve");
  const Tensor y = empty_like_x(x);
  if (a.elements == 0) return y;
  Plan p;
  a.read_parameters(p);
  set_geometry<2>(p, a, {{&p.outputs[0], &y}, {&p.x, &x}});
  add_curve(p, 0, kOne, a, Psi(a, n, m));
  put_beneath(p, a, n, m);
  execute(p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                                    const Tensor& gamma, const std::optional<Tensor>& dictionary,
                                                    double boundary, int64_t needs, int64_t kernel, int64_t base,
                                                    int64_t n, int64_t m) {
  const Arguments a(x, alpha, gamma, dictionary, boundary, kernel, base);
  a.check_like_x(grad, "grad");
  const bool need_x = needs & kNeedX, need_alpha = needs & kNeedAlpha, need_gamma = needs & kNeedGamma;
  const bool need_dictionary = dictionary && (needs & kNeedDictionary);
  a.check_order(n, m, need_alpha ? "the gradient of alpha" : "the curve");
  if (need_x) a.check_order(n + 1, m, "the gradient of x");
  if (need_gamma) a.check_order(n, m + 1, "the gradient of gamma");
  if (need_dictionary) a.check_order(n + 1, m, "the gradient of dictionary");
  const Tensor dx = empty_like_x(x, need_x);
  const Tensor dalpha = empty_gradient(alpha, need_alpha), dgamma = empty_gradient(gamma, need_gamma);
  const Tensor ddictionary = dictionary ? empty_gradient(*dictionary, need_dictionary) : empty_like_x(x, false);

  if (a.elements == 0) {
    for (const Tensor* gradient : {&dalpha, &dgamma, &ddictionary}) write_zero(*gradient);
    return {dx, dalpha, dgamma, ddictionary};
  }

  Plan p;
  a.read_parameters(p);
  if (need_x) set_geometry<3>(p, a, {{&p.outputs[0], &dx}, {&p.x, &x}, {&p.grad, &grad}});
  else set_geometry<2>(p, a, {{&p.x, &x}, {&p.grad, &grad}});
  std::optional<Psi> psi, along_x, along_gamma;
  int alpha_sum = 0, gamma_sum = 0, dictionary_sum = 0;
  if (need_x || need_dictionary) along_x.emplace(a, n + 1, m);
  if (need_x) add_curve(p, 0, kGrad, a, *along_x), put_beneath(p, a, n + 1, m);
  if (need_alpha) alpha_sum = add_sum(p, kGrad, psi.emplace(a, n, m));
  if (need_gamma) gamma_sum = add_sum(p, kGrad, along_gamma.emplace(a, n, m + 1));
  if (need_dictionary) dictionary_sum = add_sum(p, kGrad, *along_x);
  execute(p);
  if (need_alpha)
    write_gradient(dalpha, a.alpha, a.channels,
                   [&](int64_t c, int64_t k) { return sum_over(p, alpha_sum, c, k, (*psi)(c)); });
  if (need_gamma)
    write_gradient(dgamma, a.gamma, a.channels, [&](int64_t c, int64_t) {
      double total = 0;
      for (int64_t k = 0; k < a.d; ++k) total += a.alpha.at(c, k) * sum_over(p, gamma_sum, c, k, (*along_gamma)(c));
      return total;
    });
  if (need_dictionary)
    write_gradient(ddictionary, *a.dictionary, a.channels, [&](int64_t c, int64_t k) {
      return -a.alpha.at(c, k) * sum_over(p, dictionary_sum, c, k, (*along_x)(c));
    });
  return {dx, dalpha, dgamma, ddictionary};
}

// Gradients of L = <v_x, dx> + <v_alpha, dalpha> + <v_gamma, dgamma> + <v_dictionary, ddictionary>, which is
// Σ v_x g f′(x) + Σ g q(x) with q = Σ_k (v_alpha_k + v_gamma ∂/∂γ + v_dictionary_k ∂/∂δ_k) f.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    const std::optional<Tensor>& v_x, const std::optional<Tensor>& v_alpha, const std::optional<Tensor>& v_gamma,
    const std::optional<Tensor>& v_dictionary, const Tensor& grad, const Tensor& x, const Tensor& alpha,
    const Tensor& gamma, const std::optional<Tensor>& dictionary, double boundary, int64_t needs, int64_t base) {
  const Arguments a(x, alpha, gamma, dictionary, boundary, kGaussian, base);
  a.check_like_x(grad, "grad");
  if (v_x) a.check_like_x(*v_x, "v_x");
  const auto read = [](const std::optional<Tensor>& v, const Parameter& like, const char* name, int64_t dim) {
    std::optional<Parameter> values;
    if (v) {
      values.emplace(*v, name, dim);
      KAF_CHECK(values->rows == like.rows && values->columns == like.columns, name,
                " must have the shape of what it is a weight of, ", shape_of(like.tensor), ", got ", shape_of(*v));
    }
    return values;
  };
  const auto va = read(v_alpha, a.alpha, "v_alpha", 2);
  const auto vg = read(v_gamma, a.gamma, "v_gamma", 1);
  KAF_CHECK(dictionary || !v_dictionary, "v_dictionary needs a dictionary, got v_dictionary ", shape_of(*v_dictionary),
            " and dictionary None");
  const auto vd =
      v_dictionary ? read(v_dictionary, *a.dictionary, "v_dictionary", 2) : std::optional<Parameter>();

  const bool need_grad = needs & kNeedGrad, need_x = needs & kNeedX;
  const bool need_alpha = needs & kNeedAlpha, need_gamma = needs & kNeedGamma;
  const bool need_dictionary = dictionary && (needs & kNeedDictionary);
  const bool need_sums = need_alpha || need_gamma || need_dictionary;
  const Tensor dgrad = empty_like_x(x, need_grad), dx = empty_like_x(x, need_x);
  const Tensor dalpha = empty_gradient(alpha, need_alpha), dgamma = empty_gradient(gamma, need_gamma);
  const Tensor ddictionary = dictionary ? empty_gradient(*dictionary, need_dictionary) : empty_like_x(x, false);
  if (a.elements == 0) {
    for (const Tensor* gradient : {&dalpha, &dgamma, &ddictionary}) write_zero(*gradient);
    return {dgrad, dx, dalpha, dgamma, ddictionary};
  }

  const auto gamma_of = [&](int64_t c) { return a.gamma.at(c); };
  const auto f = [&](int64_t c, int64_t k) { return constant(a.alpha.at(c, k)); };
  const auto f1 = [&](int64_t c, int64_t k) { return d_dx(f(c, k), gamma_of(c)); };
  // The derivative of `of`, a term of some curve, along v_gamma and v_dictionary; q is that of f, plus v_alpha's part.
  const auto along = [&](int64_t c, int64_t k, const Term& of) {
    Term t = constant(0);
    if (vg) t = t + vg->at(c) * d_dgamma(of);
    if (vd) t = t + -vd->at(c, k) * d_dx(of, gamma_of(c));
    return t;
  };
  const auto q = [&](int64_t c, int64_t k) { return along(c, k, f(c, k)) + constant(va ? va->at(c, k) : 0.0); };
  const bool has_q = va || vg || vd;
  const int q_degree = vg ? 2 : vd ? 1 : 0;
  Plan p;
  a.read_parameters(p);
  Bound bound[5];
  int count = 0;
  if (need_grad) bound[count++] = {&p.outputs[0], &dgrad};
  if (need_x) bound[count++] = {&p.outputs[1], &dx};
  bound[count++] = {&p.x, &x};
  if (v_x) bound[count++] = {&p.v_x, &*v_x};
  if (need_x || need_sums) bound[count++] = {&p.grad, &grad};
  set_geometry(p, a, bound, count);
  if (need_grad) {
    if (v_x) add_curve_of(p, 0, kVx, 1, f1), put_beneath(p, a, 1, 0);
    if (has_q || !v_x) add_curve_of(p, 0, kOne, q_degree, q);
  }
  if (need_x) {
    if (v_x) {
      add_curve_of(p, 1, kProduct, 2, [&](int64_t c, int64_t k) { return d_dx(f1(c, k), gamma_of(c)); });
      put_beneath(p, a, 2, 0);
    }
    if (has_q || !v_x)
      add_curve_of(p, 1, kGrad, q_degree + 1, [&](int64_t c, int64_t k) { return d_dx(q(c, k), gamma_of(c)); });
  }
  int product_sum = -1, grad_sum = -1;  // which sum holds the moments of v g and of g
  if (need_sums && v_x) p.sums[product_sum = p.sums_count++] = kProduct;
  if (need_sums && has_q) p.sums[grad_sum = p.sums_count++] = kGrad;
  p.moment_degree = 4;  // of what follows
  execute(p);

  // Σ_n of v g times a term (of the k-th point) plus Σ_n of g times another.
  const auto against = [&](int64_t c, int64_t k, const Term& with_product, const Term& with_grad) {
    double sum = 0;
    if (product_sum >= 0) sum += sum_over(p, product_sum, c, k, with_product);
    if (grad_sum >= 0) sum += sum_over(p, grad_sum, c, k, with_grad);
    return sum;
  };
  if (need_alpha)
    write_gradient(dalpha, a.alpha, a.channels, [&](int64_t c, int64_t k) {
      return against(c, k, d_dx(constant(1), gamma_of(c)), along(c, k, constant(1)));
    });
  if (need_gamma)
    write_gradient(dgamma, a.gamma, a.channels, [&](int64_t c, int64_t) {
      double sum = 0;
      for (int64_t k = 0; k < a.d; ++k) {
        const Term fg = d_dgamma(f(c, k));  // derivatives commute: ∂/∂γ of q is q's formula applied to ∂f/∂γ
        sum += against(c, k, d_dx(fg, gamma_of(c)), along(c, k, fg) + d_dgamma(constant(va ? va->at(c, k) : 0.0)));
      }
      return sum;
    });
  if (need_dictionary)
    write_gradient(ddictionary, *a.dictionary, a.channels, [&](int64_t c, int64_t k) {
      return against(c, k, -1.0 * d_dx(f1(c, k), gamma_of(c)), -1.0 * d_dx(q(c, k), gamma_of(c)));
    });
  return {dgrad, dx, dalpha, dgamma, ddictionary};
}

}  // namespace
}  // namespace kaf

STABLE_TORCH_LIBRARY_FRAGMENT(kafops, m) {
#define KAF_OPERATOR(schema) m.def(schema);
#include "../../kafops/schemas.inc"
#undef KAF_OPERATOR
}

STABLE_TORCH_LIBRARY_IMPL(kafops, CPU, m) {
  m.impl("kaf", TORCH_BOX(&kaf::forward));
  m.impl("kaf_backward", TORCH_BOX(&kaf::backward));
  m.impl("kaf_double_backward", TORCH_BOX(&kaf::double_backward));
}

// For whoever loads the library: the instruction set in use, or nullptr, and the reason, where KAFOPS_CPU_CAPABILITY
// asks for one that does not run here.
#define KAF_EXPORT extern "C" __attribute__((visibility("default")))
KAF_EXPORT const char* kafops_capability() { return kaf::choice().loops ? kaf::choice().loops->name : nullptr; }
KAF_EXPORT const char* kafops_capability_error() { return kaf::choice().loops ? nullptr : kaf::choice().error.c_str(); }
