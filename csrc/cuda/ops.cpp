// The CUDA kernels of the operators in kafops/schemas.inc: reads tensors into a Call, launches it, reads the result.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "cuda/device.h"

namespace kaf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Needs : int64_t { kNeedX = 1, kNeedAlpha = 2, kNeedGamma = 4, kNeedDictionary = 8, kNeedGrad = 16 };

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                             torch::headeronly::toString(t.scalar_type()));
  }
}

std::string shape_of(const Tensor& t) {
  std::string text;
  for (const int64_t n : t.sizes()) text += (text.empty() ? "[" : ", ") + std::to_string(n);
  return text.empty() ? "[]" : text + "]";
}

void check_device(const Tensor& t, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), name, " must be on the device of x");
}

Parameter parameter(const Tensor& t, const char* name, int64_t dim, int64_t rows, int64_t columns, const Tensor& x) {
  const Type type = type_of(t, name);
  check_device(t, name, x);
  STD_TORCH_CHECK(type == Type::f32 || type == Type::f64, name, " must be float32 or float64, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == dim && t.size(0) == rows && (dim == 1 || t.size(1) == columns), name, " must be [", rows,
                  dim == 1 ? std::string() : ", " + std::to_string(columns), "], got ", shape_of(t));
  return {t.data_ptr(), rows == 1 ? 0 : t.stride(0), dim == 2 ? t.stride(1) : 0, type == Type::f64};
}

// The arguments that all operators share, and the order of memory that all tensors of x's shape are brought into.
struct Arguments {
  Tensor x;
  const Tensor &alpha, &gamma;
  const std::optional<Tensor>& dictionary;
  Type type;
  int64_t channels = 1;
  Call call{};
  std::vector<Tensor> copies;  // kept until the launch

  Arguments(const Tensor& x_, const Tensor& alpha_, const Tensor& gamma_, const std::optional<Tensor>& dictionary_,
            double boundary)
      : x(x_), alpha(alpha_), gamma(gamma_), dictionary(dictionary_), type(type_of(x_, "x")) {
    STD_TORCH_CHECK(on_device(x), "x must be on a CUDA device");
    STD_TORCH_CHECK(alpha.dim() == 2 && alpha.size(1) > 0, "alpha must be [C or 1, D] with D > 0, got ", shape_of(alpha));
    STD_TORCH_CHECK(gamma.dim() == 1, "gamma must be [C or 1], got ", shape_of(gamma));
    const int64_t d = alpha.size(1);
    STD_TORCH_CHECK(d < (1 << 30), "alpha has too many columns, ", d);
    for (const Tensor* p : {&alpha, &gamma, dictionary ? &*dictionary : nullptr})
      if (p && p->dim() > 0 && p->size(0) != 1) {
        STD_TORCH_CHECK(x.dim() >= 2 && p->size(0) == x.size(1), "a parameter has ", p->size(0),
                        " rows, but x, ", shape_of(x), ", has another number of channels");
        channels = p->size(0);
      }
    call.alpha = parameter(alpha, "alpha", 2, alpha.size(0), d, x);
    call.gamma = parameter(gamma, "gamma", 1, gamma.size(0), 1, x);
    if (dictionary) call.dictionary = parameter(*dictionary, "dictionary", 2, dictionary->size(0), d, x);
    call.size = static_cast<int>(d);
    call.boundary = boundary;
    call.windows = 1;
    call.alpha_slot = call.dictionary_slot = call.gamma_slot = -1;
  }

  // Makes an output, as x lies in memory.
  Tensor like_x() const { return torch::stable::empty_like(x); }

  // The data of a tensor of x's shape, copied first where it does not lie in memory as the output.
  const void* data(const Tensor& t, const char* name, const Tensor& output) {
    check_device(t, name, x);
    bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
    STD_TORCH_CHECK(same, name, " must have the shape and dtype of x, ", shape_of(x), " ",
                    torch::headeronly::toString(x.scalar_type()), ", got ", shape_of(t), " ",
                    torch::headeronly::toString(t.scalar_type()));
    for (int64_t i = 0; i < x.dim(); ++i) same = same && (t.size(i) == 1 || t.stride(i) == output.stride(i));
    if (same) return t.data_ptr();
    copies.push_back(torch::stable::empty_like(output));
    torch::stable::copy_(copies.back(), t);
    return copies.back().data_ptr();
  }

  // Divides memory, which is [rows, columns, inner] in the order of `output`, among blocks. Every pointer of the call is
  // set before.
  void set_tiling(const Tensor& output, int threads) {
    int64_t outside = 1, inside = channels == 1 ? output.numel() : 1;
    for (int64_t i = 0; channels > 1 && i < output.dim(); ++i)
      if (i != 1) (output.stride(i) > output.stride(1) ? outside : inside) *= output.size(i);
    Tiling& t = call.tiling;
    const bool runs = inside >= 32 || channels == 1;  // long enough for a warp
    t.rows = outside;
    t.pitch = channels * inside;
    t.inner = runs ? inside : 1;
    t.columns = runs ? channels : t.pitch;
    t.columns_per_channel = runs ? 1 : inside;

    const int64_t bytes = type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
    t.vectors = runs && t.inner * bytes % 16 == 0;
    for (const void* p : {call.x, call.grad, call.v_x, static_cast<const void*>(call.y), static_cast<const void*>(call.dx),
                          static_cast<const void*>(call.dgrad)})
      t.vectors = t.vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    // The direct path stages points for each column, so it takes fewer at once.
    const int64_t most_columns = call.tables.cells ? 32 : 8;
    const int64_t columns = std::bit_ceil(static_cast<uint64_t>(t.columns));
    t.columns_at_once = runs ? 1 : static_cast<int>(std::min(columns, most_columns));

    // Elements of a thread: one tile at least, at most 64, so that float32 sums lose nothing, or 128 where a block copies
    // the tables of 32 channels or makes one of all answers; and fewer where there would be fewer threads than a large GPU
    // holds.
    t.threads = call.tables.cells ? threads : kThreads;
    const int64_t elements = t.vectors ? 16 / bytes : bytes == 8 ? 2 : 4, tile = t.threads / t.columns_at_once * elements;
    const int64_t column_blocks = (t.columns + t.columns_at_once - 1) / t.columns_at_once;
    const int64_t tiles = (t.rows * t.inner + tile - 1) / tile;
    const int64_t most = (runs && !few_numbers() ? 64 : 128) / elements;
    const int64_t positions = tile * std::clamp<int64_t>(tiles * column_blocks * t.threads / (256 * 1024), 1, most);
    if (t.inner >= positions) {
      const int64_t parts = (t.inner + positions - 1) / positions;
      const int64_t run = ((t.inner + parts - 1) / parts + tile - 1) / tile * tile;
      t.run = static_cast<int>(std::min(run, t.inner));
      t.rows_per_block = 1;
    } else {
      t.run = static_cast<int>(t.inner);
      const int64_t most_rows = std::max<int64_t>(1, (int64_t{1} << 31) / std::max<int64_t>(t.pitch, 1) - 1);
      t.rows_per_block = static_cast<int>(std::clamp<int64_t>(positions / t.inner, 1, std::min(most_rows, t.rows)));
    }
    t.run_blocks = (t.inner + t.run - 1) / t.run;
    t.row_blocks = (t.rows + t.rows_per_block - 1) / t.rows_per_block;
    t.step = t.run == 1 ? static_cast<uint32_t>(t.pitch) : 1;
    if (t.run > 1 && t.rows_per_block > 1) {
      const int s = std::bit_width(static_cast<uint32_t>(t.run - 1));  // ceil(log2(run))
      t.row_step = static_cast<uint32_t>(t.pitch - t.run);
      t.run_magic = static_cast<uint32_t>(((uint64_t{1} << (31 + s)) + t.run - 1) / t.run);
      t.run_shift = s - 1;
    }
    STD_TORCH_CHECK(blocks_of(t) * call.windows < (int64_t{1} << 31), "x has too many elements for one launch");

    // Where a block has no more than twice as many elements as there are numbers, cells cost less.
    const int powers = 20 + std::bit_width(static_cast<unsigned>(2 * call.tables.capacity));
    if (few_numbers() && t.vectors && by_count(t.run * t.rows_per_block >= 2 * 2 * 128 * powers)) call.powers = powers;
  }

  // Whether the call evaluates one curve on cells, of few numbers.
  bool few_numbers() const {
    return call.tables.cells && call.tables.count == 1 && type == Type::bf16 && call.dictionary_slot < 0;
  }

  // Instructions that tables of the call's curves save in a channel, of D points and so many elements, less those that
  // making them costs; counted by hand, an exponential as eight. Sums over even points are formed from powers, others
  // with tables as without: then these save half of a point's.
  double saved(int64_t elements) const {
    const double size = call.size, curves = call.tables.count;
    const bool second = call.tables.curves[1] == kCurvature && call.tables.count > 1;
    const bool sums = call.alpha_slot >= 0 || call.dictionary_slot >= 0;
    const bool powers = !second && !dictionary && call.dictionary_slot < 0;
    const double of_point = (second ? 40 : 8) * (sums && !powers ? 0.5 : 1) - (sums && powers ? 3 : 0);
    const double made = curves * call.tables.capacity * kCoefficients * 25 * size;
    return elements * (of_point * size - 10 - 16 * curves) - made;
  }

  // Has tables of these curves made, where they save instructions. They take at most a quarter of x's memory.
  Tensor make_tables(std::initializer_list<Curve> curves, Stream stream) {
    if (type == Type::f64 || call.size > kTablePoints) return {};
    Tables& t = call.tables;
    t.channels = channels;
    t.count = static_cast<int>(curves.size());
    t.capacity = static_cast<int>(std::min<size_t>(cells_for(call.size), most_shared(x) / kCellBytes / t.count));
    std::copy(curves.begin(), curves.end(), t.curves);
    const int64_t bytes = channels * bytes_of(t, call.size), of_x = x.numel() * (type == Type::f32 ? 4 : 2);
    if (!by_count(bytes <= of_x / 4 && saved(x.numel() / channels) > 0)) return {};
    Tensor workspace = torch::stable::new_empty(x, {bytes / 4}, ScalarType::Float);
    t.cells = static_cast<Cells*>(workspace.data_ptr());
    t.points = reinterpret_cast<Point*>(t.cells + channels);
    t.rows = reinterpret_cast<float*>(t.points + channels * call.size);
    call.uniform = uniform(call.boundary, call.size);
    check(launch_tables(call, stream));
    return workspace;
  }

  // Says which sums are wanted; the partial sums are allocated once the tiling is known.
  void want_sums(bool of_alpha, bool of_dictionary, bool of_gamma) {
    if (of_alpha) call.alpha_slot = std::exchange(call.slots, call.slots + call.size);
    if (of_dictionary) call.dictionary_slot = std::exchange(call.slots, call.slots + call.size);
    if (of_gamma) call.gamma_slot = call.slots++;
    const int window = type == Type::f64 ? kWindow<double> : kWindow<float>;
    if (of_alpha || of_dictionary) call.windows = (call.size + window - 1) / window;
  }

  Tensor partial() {
    const int64_t n = chunks_of(call.tiling) * call.tiling.columns * call.slots;
    Tensor sums = torch::stable::new_empty(x, {n}, type == Type::f64 ? ScalarType::Double : ScalarType::Float);
    call.partial = sums.data_ptr();
    return sums;
  }

  // From partial sums to the gradients of the parameters; those not wanted are empty already.
  void reduce(const Tensor& dalpha, const Tensor& dgamma, const Tensor& ddictionary, Stream stream) const {
    if (call.slots == 0) return;
    const Tiling& t = call.tiling;
    Reduction r{call.partial, type == Type::f64, chunks_of(t), t.columns, t.columns_per_channel, call.slots, 0, {}};
    const auto add = [&](const Tensor& out, int slot) {
      if (slot < 0) return;
      r.gradients[r.count++] = {out.data_ptr(), out.scalar_type() == ScalarType::Double, slot, out.size(0),
                                out.dim() == 2 ? out.size(1) : 1};
    };
    add(dalpha, call.alpha_slot);
    add(ddictionary, call.dictionary_slot);
    add(dgamma, call.gamma_slot);
    check(launch_reduction(r, stream));
  }
};

// A parameter's gradient: empty where it is not needed, zero where no element will add to it.
Tensor gradient(const Tensor& like, bool needed, bool no_elements) {
  if (!needed) return torch::stable::new_empty(like, {0});
  return no_elements ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, like.sizes());
}
Tensor of_x(const Arguments& a, bool needed) { return needed ? a.like_x() : torch::stable::new_empty(a.x, {0}); }

// Computes what these kernels lack by an operator that the Python package defines, with the same arguments.
template <class... Outputs, class... Inputs>
std::tuple<Outputs...> in_python(const char* name, const Inputs&... inputs) {
  std::array<StableIValue, std::max(sizeof...(Inputs), sizeof...(Outputs))> stack{torch::stable::detail::from(inputs)...};
  try {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, "kafops' CUDA kernels compute the Gaussian and its first two derivatives, without a base; all "
                    "else is left to the operator ", name, " of the Python package kafops, which is not imported here, or "
                    "failed: ", error.what());
  }
  return torch::stable::detail::unbox_to_tuple<Outputs...>(stack.data());
}

Tensor forward(Tensor x, Tensor alpha, Tensor gamma, std::optional<Tensor> dictionary, double boundary, int64_t kernel,
               int64_t base, int64_t n, int64_t m) {
  Arguments a(x, alpha, gamma, dictionary, boundary);
  if (kernel || base || n || m) {
    const char* name = "kafops::plain_kaf";
    return std::get<0>(in_python<Tensor>(name, x, alpha, gamma, dictionary, boundary, kernel, base, n, m));
  }
  const Guard guard(x);
  Tensor y = a.like_x();
  if (x.numel() == 0) return y;
  a.call.x = a.data(x, "x", y);
  a.call.y = y.data_ptr();
  const Tensor workspace = a.make_tables({kValue}, stream_of(x));
  a.set_tiling(y, kForwardThreads);
  check(launch_forward(a.call, a.type, stream_of(x)));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor alpha, Tensor gamma,
                                                    std::optional<Tensor> dictionary, double boundary, int64_t needs,
                                                    int64_t kernel, int64_t base, int64_t n, int64_t m) {
  Arguments a(x, alpha, gamma, dictionary, boundary);
  if (kernel || base || n || m)
    return in_python<Tensor, Tensor, Tensor, Tensor>("kafops::plain_kaf_backward", grad, x, alpha, gamma, dictionary,
                                                     boundary, needs, kernel, base, n, m);
  const Guard guard(x);
  const bool need_dictionary = dictionary && (needs & kNeedDictionary), empty = x.numel() == 0;
  Tensor dx = of_x(a, needs & kNeedX), dalpha = gradient(alpha, needs & kNeedAlpha, empty),
         dgamma = gradient(gamma, needs & kNeedGamma, empty),
         ddictionary = gradient(dictionary ? *dictionary : alpha, need_dictionary, empty);
  a.want_sums(needs & kNeedAlpha, need_dictionary, needs & kNeedGamma);
  if (empty || (a.call.slots == 0 && !(needs & kNeedX))) return {dx, dalpha, dgamma, ddictionary};
  const Tensor layout = needs & kNeedX ? dx : a.like_x();
  a.call.x = a.data(x, "x", layout);
  a.call.grad = a.data(grad, "grad", layout);
  if (needs & kNeedX) a.call.dx = dx.data_ptr();
  const Stream stream = stream_of(x);
  const Tensor workspace = needs & kNeedGamma ? a.make_tables({kSlope, kByGamma}, stream) : a.make_tables({kSlope}, stream);
  a.set_tiling(layout, kBackwardThreads);
  const Tensor partial = a.partial();
  check(launch_backward(a.call, a.type, stream_of(x)));
  a.reduce(dalpha, dgamma, ddictionary, stream_of(x));
  return {dx, dalpha, dgamma, ddictionary};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    std::optional<Tensor> v_x, std::optional<Tensor> v_alpha, std::optional<Tensor> v_gamma,
    std::optional<Tensor> v_dictionary, Tensor grad, Tensor x, Tensor alpha, Tensor gamma,
    std::optional<Tensor> dictionary, double boundary, int64_t needs, int64_t base) {
  Arguments a(x, alpha, gamma, dictionary, boundary);
  STD_TORCH_CHECK(dictionary || !v_dictionary, "v_dictionary needs a dictionary, got None");
  if (base)
    return in_python<Tensor, Tensor, Tensor, Tensor, Tensor>("kafops::plain_kaf_double_backward", v_x, v_alpha, v_gamma,
                                                             v_dictionary, grad, x, alpha, gamma, dictionary, boundary,
                                                             needs, base);
  const Guard guard(x);
  const bool need_dictionary = dictionary && (needs & kNeedDictionary), empty = x.numel() == 0;
  Tensor dgrad = of_x(a, needs & kNeedGrad), dx = of_x(a, needs & kNeedX),
         dalpha = gradient(alpha, needs & kNeedAlpha, empty), dgamma = gradient(gamma, needs & kNeedGamma, empty),
         ddictionary = gradient(dictionary ? *dictionary : alpha, need_dictionary, empty);
  const auto read = [&](const std::optional<Tensor>& v, const Tensor& like, const char* name) {
    if (!v) return Parameter{};
    return parameter(*v, name, like.dim(), like.size(0), like.dim() == 2 ? like.size(1) : 1, x);
  };
  a.call.v_alpha = read(v_alpha, alpha, "v_alpha");
  a.call.v_gamma = read(v_gamma, gamma, "v_gamma");
  if (v_dictionary) a.call.v_dictionary = read(v_dictionary, *dictionary, "v_dictionary");
  a.want_sums(needs & kNeedAlpha, need_dictionary, needs & kNeedGamma);
  if (empty || (a.call.slots == 0 && !(needs & (kNeedX | kNeedGrad)))) return {dgrad, dx, dalpha, dgamma, ddictionary};
  const Tensor layout = needs & kNeedX ? dx : needs & kNeedGrad ? dgrad : a.like_x();
  a.call.x = a.data(x, "x", layout);
  a.call.grad = a.data(grad, "grad", layout);
  if (v_x) a.call.v_x = a.data(*v_x, "v_x", layout);
  if (needs & kNeedX) a.call.dx = dx.data_ptr();
  if (needs & kNeedGrad) a.call.dgrad = dgrad.data_ptr();
  const bool along = v_alpha || v_gamma || v_dictionary, by_gamma = needs & kNeedGamma;
  const Stream stream = stream_of(x);
  const Tensor workspace =
      along ? by_gamma ? a.make_tables({kSlope, kCurvature, kAlong, kAlongSlope, kSlopeByGamma, kAlongByGamma}, stream)
                       : a.make_tables({kSlope, kCurvature, kAlong, kAlongSlope}, stream)
            : by_gamma ? a.make_tables({kSlope, kCurvature, kSlopeByGamma}, stream) : a.make_tables({kSlope, kCurvature}, stream);
  a.set_tiling(layout, kBackwardThreads);
  const Tensor partial = a.partial();
  check(launch_double_backward(a.call, a.type, stream_of(x)));
  a.reduce(dalpha, dgamma, ddictionary, stream_of(x));
  return {dgrad, dx, dalpha, dgamma, ddictionary};
}

}  // namespace
}  // namespace kaf

STABLE_TORCH_LIBRARY_IMPL(kafops, CUDA, m) {
  m.impl("kaf", TORCH_BOX(&kaf::forward));
  m.impl("kaf_backward", TORCH_BOX(&kaf::backward));
  m.impl("kaf_double_backward", TORCH_BOX(&kaf::double_backward));
}

// The Python module: importing it registers the kernels; architectures() names what they were compiled for.
static PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(KAFOPS_CUDA_ARCHITECTURES); }

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyMethodDef methods[] = {
      {"architectures", architectures, METH_NOARGS, "Compute capabilities that the kernels were compiled for."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", "The CUDA kernels of kafops.", -1, methods,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
