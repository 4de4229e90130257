// From the type of a call's tensors to the kernels of that type, each of which has a file of its own.
#include "kernels.cuh"

namespace kaf {

#define KAF_ELSEWHERE(T)                                      \
  extern template int forward_of<T>(const Call&, Stream);     \
  extern template int backward_of<T>(const Call&, Stream);    \
  extern template int double_backward_of<T>(const Call&, Stream);
KAF_ELSEWHERE(float)
KAF_ELSEWHERE(double)
KAF_ELSEWHERE(bfloat16)
KAF_ELSEWHERE(float16)

namespace {
template <class F> int of_type(Type type, F use) {
  switch (type) {
    case Type::f64: return use(double());
    case Type::bf16: return use(bfloat16());
    case Type::f16: return use(float16());
    default: return use(float());
  }
}
}  // namespace

int launch_forward(const Call& call, Type type, Stream stream) {
  return of_type(type, [&](auto t) { return forward_of<decltype(t)>(call, stream); });
}
int launch_backward(const Call& call, Type type, Stream stream) {
  return of_type(type, [&](auto t) { return backward_of<decltype(t)>(call, stream); });
}
int launch_double_backward(const Call& call, Type type, Stream stream) {
  return of_type(type, [&](auto t) { return double_backward_of<decltype(t)>(call, stream); });
}
int launch_reduction(const Reduction& r, Stream stream) {
  int64_t outputs = 0;
  for (int i = 0; i < r.count; ++i) outputs += r.gradients[i].rows * r.gradients[i].size;
  const dim3 grid(static_cast<unsigned>((outputs + kThreads / 32 - 1) / (kThreads / 32)));
  return launch(r.is_double ? reduce_kernel<double> : reduce_kernel<float>, grid, 0, stream, r);
}

Uniform uniform(double boundary, int64_t size) {
  const double step = size > 1 ? 2 * boundary / (size - 1) : 1, log2e = 1.4426950408889634;
  return {static_cast<float>(step), split<float>(1 / step), split<float>(2 * step * log2e), split<float>(step * step * log2e)};
}

}  // namespace kaf
