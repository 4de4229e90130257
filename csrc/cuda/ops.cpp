// The CUDA kernels of the operators in kafops/schemas.inc: reads tensors into a Call, launches it, reads the result.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "cuda/device.h"

namespace kaf {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
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
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), name, " must be on the device of x, cuda:",
                  x.get_device_index(), ", got one on ",
                  on_device(t) ? "cuda:" + std::to_string(t.get_device_index()) : "no CUDA device");
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

// Whether t's elements lie side by side in memory, in whatever order.
bool is_dense(const Tensor& t) {
  const IntHeaderOnlyArrayRef sizes = t.sizes(), strides = t.strides();
  int64_t covered = 1;
  for (bool more = t.numel() > 0; more;) {
    more = false;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1 && strides[i] == covered) covered *= sizes[i], more = true;
  }
  return covered == t.numel() || t.numel() == 0;
}

// A tensor of the shape, dtype and layout of another, or an empty one where it is not needed.
Tensor new_like(const Tensor& t, bool needed = true) {
  constexpr int64_t none = 0, one = 1;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  if (!needed) return empty({&none, 1}, {&one, 1}, dtype, t);
  return is_dense(t) ? empty(t.sizes(), t.strides(), dtype, t) : torch::stable::empty_like(t);
}

// The a_p of ψ[n, m]: see Psi. Numbers of few bits, exact in float32.
void put_psi(float* a, int64_t n, int64_t m) {
  a[0] = 1;
  for (int64_t j = 0; j < m; ++j)  // γ ∂/∂γ is (u/2) ∂/∂u
    for (int64_t p = j + 1; p >= 0; --p) a[p] = (p <= j ? (p / 2.0f - j) * a[p] : 0) + (p > 0 ? a[p - 1] / 2 : 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t p = 0; p < m; ++p) a[p] += (p + 1) * a[p + 1];
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
    fit("alpha", alpha);
    fit("gamma", gamma);
    if (dictionary) fit("dictionary", *dictionary);
    call.alpha = parameter(alpha, "alpha", 2, alpha.size(0), d, x);
    call.gamma = parameter(gamma, "gamma", 1, gamma.size(0), 1, x);
    if (dictionary) call.dictionary = parameter(*dictionary, "dictionary", 2, dictionary->size(0), d, x);
    call.size = static_cast<int>(d);
    call.boundary = boundary;
  }

  void fit(const char* name, const Tensor& p) {
    if (p.dim() == 0 || p.size(0) == 1) return;
    STD_TORCH_CHECK(x.dim() >= 2 && p.size(0) == x.size(1), name,
                    " must have one row per channel of x (dimension 1) or a single row, got ", name, " ", shape_of(p),
                    " for x ", shape_of(x));
    channels = p.size(0);
  }

  // What the curve is, and which of its gradients are needed; 0 is the curve itself.
  void set_curve(int64_t kernel, int64_t base, int64_t n, int64_t m, int64_t needs) {
    STD_TORCH_CHECK(0 <= kernel && kernel < kKernels, "kappa must be a code from 0 to ", kKernels - 1, ", got ", kernel);
    STD_TORCH_CHECK(kNoBase <= base && base <= kGelu, "base must be a code from 0 to ", int{kGelu}, ", got ", base);
    const bool by_x = needs & (kNeedX | kNeedDictionary), by_gamma = needs & kNeedGamma;
    for (const auto [of_x, of_gamma, wanted] : {std::array{n, m, int64_t{1}}, {n + 1, m, by_x}, {n, m + 1, by_gamma}})
      STD_TORCH_CHECK(!wanted || offers(kernel, of_x, of_gamma), "kafops offers derivatives up to n + 2m = ", kHighest,
                      ", n + m = 2 of the kernels with the codes 2 and 3; got n = ", of_x, " and m = ", of_gamma,
                      " of kernel ", kernel, ", gradients included");
    call.base = m == 0 ? static_cast<int>(base) : kNoBase;
    if (!kernel && !n && !m) return;
    call.psi = {static_cast<int>(kernel), static_cast<int>(n), static_cast<int>(m)};
    call.psi.count = static_cast<int>(m + 1 + (by_x || by_gamma));
    put_psi(call.psi.a[0], n, m);
    if (by_x) put_psi(call.psi.a[1] + 1, n + 1, m);  // of u^p κ^(n + 1 + p)
    if (by_gamma) put_psi(call.psi.a[2], n, m + 1);
    call.base_order = static_cast<int>(n + (needs & kNeedX ? 1 : 0));
    if (call.base == kSilu) call.eulerian = eulerian(call.base_order);
  }

  // A tensor of the shape and the strides of outputs.
  Tensor layout() const { return is_dense(x) ? x : torch::stable::empty_like(x); }

  // The data of a tensor of x's shape, copied first where it does not lie in memory as the output.
  const void* data(const Tensor& t, const char* name, const Tensor& output) {
    check_device(t, name, x);
    const IntHeaderOnlyArrayRef sizes = t.sizes(), strides = t.strides(), wanted = output.strides();
    bool same = sizes == x.sizes() && t.scalar_type() == x.scalar_type();
    STD_TORCH_CHECK(same, name, " must have the shape and dtype of x, ", shape_of(x), " ",
                    torch::headeronly::toString(x.scalar_type()), ", got ", shape_of(t), " ",
                    torch::headeronly::toString(t.scalar_type()));
    for (size_t i = 0; i < sizes.size(); ++i) same = same && (sizes[i] == 1 || strides[i] == wanted[i]);
    if (same) return t.data_ptr();
    copies.push_back(new_like(output));
    torch::stable::copy_(copies.back(), t);
    return copies.back().data_ptr();
  }

  // Divides memory, which is [rows, columns, inner] in the order of `output`, among blocks. Every pointer of the call is
  // set before.
  void set_tiling(const Tensor& output, int threads) {
    int64_t outside = 1, inside = channels == 1 ? output.numel() : 1;
    const IntHeaderOnlyArrayRef sizes = output.sizes(), strides = output.strides();
    for (size_t i = 0; channels > 1 && i < sizes.size(); ++i)
      if (i != 1) (strides[i] > strides[1] ? outside : inside) *= sizes[i];
    Tiling& t = call.tiling;
    const bool runs = inside >= 32 || channels == 1;  // long enough for a warp
    t.rows = outside;
    t.pitch = channels * inside;
    t.inner = runs ? inside : 1;
    t.columns = runs ? channels : t.pitch;
    STD_TORCH_CHECK(t.columns < int64_t{1} << 31, "x has too many columns for one launch, ", shape_of(x));
    t.columns_per_channel = divisor(runs ? 1 : inside);

    const int64_t bytes = type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
    t.vectors = runs && t.inner * bytes % 16 == 0;
    for (const void* p : {call.x, call.grad, call.v_x, static_cast<const void*>(call.y), static_cast<const void*>(call.dx),
                          static_cast<const void*>(call.dgrad)})
      t.vectors = t.vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    // The direct path stages points for each column, so it takes fewer at once.
    const int64_t most_columns = call.tables.count ? 32 : 8;
    const int64_t columns = std::bit_ceil(static_cast<uint64_t>(t.columns));
    t.columns_at_once = runs ? 1 : static_cast<int>(std::min(columns, most_columns));

    // Elements of a thread: one tile at least, at most 64, so that float32 sums lose nothing, or 128 where a block copies
    // the tables of 32 channels or makes one of all answers; and fewer where there would be fewer threads than a large GPU
    // holds.
    t.threads = call.tables.count ? threads : kThreads;
    t.columns_shift = std::countr_zero(static_cast<unsigned>(t.columns_at_once));
    t.group_shift = std::countr_zero(static_cast<unsigned>(t.threads)) - t.columns_shift;
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
    const int64_t run_blocks = (t.inner + t.run - 1) / t.run, row_blocks = (t.rows + t.rows_per_block - 1) / t.rows_per_block;
    STD_TORCH_CHECK(run_blocks * row_blocks < int64_t{1} << 31, "x is too large for one launch, ", shape_of(x));
    t.run_blocks = divisor(run_blocks);
    t.chunks = divisor(run_blocks * row_blocks);
    t.step = t.run == 1 ? static_cast<uint32_t>(t.pitch) : 1;
    if (t.run > 1 && t.rows_per_block > 1) {
      t.row_step = static_cast<uint32_t>(t.pitch - t.run);
      t.whole_run = divisor(t.run);
    }
    STD_TORCH_CHECK(blocks_of(t) < (int64_t{1} << 31) / call.windows.by, "x and alpha are too large for one launch: ",
                    blocks_of(t), " blocks for the elements of x, ", shape_of(x), ", each ", call.windows.by,
                    " times for alpha, ", shape_of(alpha));

    // Where a block has no more than twice as many elements as there are numbers, cells cost less.
    const int powers = powers_for(call.tables.capacity);
    if (few_numbers() && t.vectors && by_count(t.run * t.rows_per_block >= 2 * 2 * 128 * powers)) call.powers = powers;
  }

  // Whether the call evaluates one curve on cells, of few numbers.
  bool few_numbers() const {
    return call.tables.count == 1 && type == Type::bf16 && call.ddictionary.slot < 0;
  }

  // Instructions that tables of the call's curves save in a channel, of D points and so many elements, less those that
  // making them costs; counted by hand, an exponential as eight. Sums over even points are formed from powers, others
  // with tables as without: then these save half of a point's.
  double saved(int64_t elements) const {
    const double size = call.size, curves = call.tables.count;
    const bool second = call.tables.curves[1] == kCurvature && call.tables.count > 1;
    const bool sums = call.dalpha.slot >= 0 || call.ddictionary.slot >= 0;
    const bool powers = !second && !dictionary && call.ddictionary.slot < 0;
    const double of_point = (second ? 40 : 8) * (sums && !powers ? 0.5 : 1) - (sums && powers ? 3 : 0);
    const double made = curves * call.tables.capacity * kCoefficients * 25 * size;
    return elements * (of_point * size - 10 - 16 * curves) - made;
  }

  // Decides for tables of these curves where they save instructions. They take at most a quarter of x's memory.
  void want_tables(std::initializer_list<Curve> curves) {
    if (type == Type::f64 || call.size > kTablePoints || call.psi.count) return;
    Tables& t = call.tables;
    t.channels = channels;
    t.count = static_cast<int>(curves.size());
    const size_t cells = cells_for(call.size), each = kCellBytes * t.count;
    t.capacity = static_cast<int>(std::min(cells, most_shared(x, cells * each) / each));
    std::copy(curves.begin(), curves.end(), t.curves);
    const int64_t of_x = x.numel() * (type == Type::f32 ? 4 : 2);
    if (!by_count(channels * bytes_of(t, call.size) <= of_x / 4 && saved(x.numel() / channels) > 0)) t = {};
  }

  // A parameter's gradient: empty where it is not needed, zero where no element will add to it.
  Tensor gradient(Gradient& g, const Tensor& like, bool needed) {
    if (!needed) return new_like(like, false);
    const int64_t rows = like.size(0), size = like.dim() == 2 ? like.size(1) : 1, strides[2] = {size, 1};
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    Tensor out = empty(like.sizes(), {strides, static_cast<size_t>(like.dim())}, dtype, like);
    if (x.numel() == 0) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));
    g = {out.data_ptr(), like.scalar_type() == ScalarType::Double, call.slots, rows, size};
    call.slots += static_cast<int>(size);
    const int window = type == Type::f64 ? kWindow<double> : kWindow<float>;
    if (like.dim() == 2) call.windows = divisor((call.size + window - 1) / window);
    return out;
  }

  // Whether blocks add up what they leave, which spares a launch: where nothing is to be added over columns, and sums are
  // few. In calls without tables nothing is launched before that could set counters to 0, and one chunk needs none.
  bool finishes() const {
    const Tiling& t = call.tiling;
    bool own = call.slots > 0 && t.columns_per_channel.by == 1;
    for (const Gradient* g : {&call.dalpha, &call.ddictionary, &call.dgamma})
      own = own && (g->slot < 0 || g->rows == channels);
    const int64_t chunks = int64_t{t.chunks.by}, outputs = t.columns_at_once * std::min(call.slots, 2 * kWindow<float>);
    const int64_t of_a_thread = (outputs + t.threads - 1) / t.threads * chunks;
    return own && (chunks == 1 || (call.tables.count && of_a_thread <= kFinished));
  }

  // Allocates what the call needs beside its outputs, and has the tables made.
  Tensor prepare(Stream stream) {
    Tables& t = call.tables;
    const int64_t sums = int64_t{call.tiling.chunks.by} * call.tiling.columns * call.slots * (type == Type::f64 ? 8 : 4);
    const int64_t tables = t.count ? channels * bytes_of(t, call.size) : 0;
    call.finishes = finishes();
    const int64_t counters = call.finishes && t.count ? channels * call.windows.by * 4 : 0;
    const int64_t bytes = tables + sums + counters, one = 1;
    if (bytes == 0) return {};
    Tensor workspace = empty({&bytes, 1}, {&one, 1}, aoti_torch_dtype_uint8(), x);
    auto* const memory = static_cast<unsigned char*>(workspace.data_ptr());
    call.partial = memory + tables;
    call.counters = reinterpret_cast<unsigned*>(memory + tables + sums);
    if (!t.count) return workspace;
    t.cells = reinterpret_cast<Cells*>(memory);
    t.points = reinterpret_cast<Point*>(t.cells + channels);
    t.rows = reinterpret_cast<float*>(t.points + channels * call.size);
    call.uniform = uniform(call.boundary, call.size);
    check(launch_tables(call, stream));
    return workspace;
  }

  // From partial sums to the gradients of the parameters, where that is not done.
  void reduce(Stream stream) const {
    if (call.slots > 0 && !call.finishes) check(launch_reduction(call, type, stream));
  }
};

Tensor forward(const Tensor& x, const Tensor& alpha, const Tensor& gamma, const std::optional<Tensor>& dictionary,
               double boundary, int64_t kernel, int64_t base, int64_t n, int64_t m) {
  Arguments a(x, alpha, gamma, dictionary, boundary);
  a.set_curve(kernel, base, n, m, 0);
  const Guard guard(x);
  Tensor y = new_like(x);
  if (x.numel() == 0) return y;
  a.call.x = a.data(x, "x", y);
  a.call.y = y.data_ptr();
  a.want_tables({kValue});
  a.set_tiling(y, kForwardThreads);
  const Stream stream = stream_of(x);
  const Tensor workspace = a.prepare(stream);
  check(launch_forward(a.call, a.type, stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                                    const Tensor& gamma, const std::optional<Tensor>& dictionary,
                                                    double boundary, int64_t needs, int64_t kernel, int64_t base,
                                                    int64_t n, int64_t m) {
  Arguments a(x, alpha, gamma, dictionary, boundary);
  const bool need_dictionary = dictionary && (needs & kNeedDictionary);
  a.set_curve(kernel, base, n, m, dictionary ? needs : needs & ~kNeedDictionary);
  const Guard guard(x);
  Tensor dx = new_like(x, needs & kNeedX), dalpha = a.gradient(a.call.dalpha, alpha, needs & kNeedAlpha),
         dgamma = a.gradient(a.call.dgamma, gamma, needs & kNeedGamma),
         ddictionary = a.gradient(a.call.ddictionary, dictionary ? *dictionary : x, need_dictionary);
  if (x.numel() == 0 || (a.call.slots == 0 && !(needs & kNeedX))) return {dx, dalpha, dgamma, ddictionary};
  const Tensor layout = needs & kNeedX ? dx : a.layout();
  a.call.x = a.data(x, "x", layout);
  a.call.grad = a.data(grad, "grad", layout);
  if (needs & kNeedX) a.call.dx = dx.data_ptr();
  if (needs & kNeedGamma) a.want_tables({kSlope, kByGamma});
  else a.want_tables({kSlope});
  a.set_tiling(layout, kBackwardThreads);
  const Stream stream = stream_of(x);
  const Tensor workspace = a.prepare(stream);
  check(launch_backward(a.call, a.type, stream));
  a.reduce(stream);
  return {dx, dalpha, dgamma, ddictionary};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    const std::optional<Tensor>& v_x, const std::optional<Tensor>& v_alpha, const std::optional<Tensor>& v_gamma,
    const std::optional<Tensor>& v_dictionary, const Tensor& grad, const Tensor& x, const Tensor& alpha,
    const Tensor& gamma, const std::optional<Tensor>& dictionary, double boundary, int64_t needs, int64_t base) {
  Arguments a(x, alpha, gamma, dictionary, boundary);
  STD_TORCH_CHECK(dictionary || !v_dictionary, "v_dictionary needs a dictionary, got None");
  a.set_curve(kGaussian, base, 0, 0, 0);
  const Guard guard(x);
  const bool need_dictionary = dictionary && (needs & kNeedDictionary);
  Tensor dgrad = new_like(x, needs & kNeedGrad), dx = new_like(x, needs & kNeedX),
         dalpha = a.gradient(a.call.dalpha, alpha, needs & kNeedAlpha),
         dgamma = a.gradient(a.call.dgamma, gamma, needs & kNeedGamma),
         ddictionary = a.gradient(a.call.ddictionary, dictionary ? *dictionary : x, need_dictionary);
  const auto read = [&](const std::optional<Tensor>& v, const Tensor& like, const char* name) {
    if (!v) return Parameter{};
    return parameter(*v, name, like.dim(), like.size(0), like.dim() == 2 ? like.size(1) : 1, x);
  };
  a.call.v_alpha = read(v_alpha, alpha, "v_alpha");
  a.call.v_gamma = read(v_gamma, gamma, "v_gamma");
  if (v_dictionary) a.call.v_dictionary = read(v_dictionary, *dictionary, "v_dictionary");
  if (x.numel() == 0 || (a.call.slots == 0 && !(needs & (kNeedX | kNeedGrad))))
    return {dgrad, dx, dalpha, dgamma, ddictionary};
  const Tensor layout = needs & kNeedX ? dx : needs & kNeedGrad ? dgrad : a.layout();
  a.call.x = a.data(x, "x", layout);
  a.call.grad = a.data(grad, "grad", layout);
  if (v_x) a.call.v_x = a.data(*v_x, "v_x", layout);
  if (needs & kNeedX) a.call.dx = dx.data_ptr();
  if (needs & kNeedGrad) a.call.dgrad = dgrad.data_ptr();
  const bool along = v_alpha || v_gamma || v_dictionary, by_gamma = needs & kNeedGamma;
  if (along && by_gamma) a.want_tables({kSlope, kCurvature, kAlong, kAlongSlope, kSlopeByGamma, kAlongByGamma});
  else if (along) a.want_tables({kSlope, kCurvature, kAlong, kAlongSlope});
  else if (by_gamma) a.want_tables({kSlope, kCurvature, kSlopeByGamma});
  else a.want_tables({kSlope, kCurvature});
  a.set_tiling(layout, kBackwardThreads);
  const Stream stream = stream_of(x);
  const Tensor workspace = a.prepare(stream);
  check(launch_double_backward(a.call, a.type, stream));
  a.reduce(stream);
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
