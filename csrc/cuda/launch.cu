// From the type of a call's tensors to the kernels of that type, each of which has a file of its own.
#include "kernels.cuh"
#include "tables.cuh"

namespace kaf {

#define KAF_ELSEWHERE(T)                                             \
  extern template int launch_of<T, kForward>(const Call&, Stream);  \
  extern template int launch_of<T, kBackward>(const Call&, Stream); \
  extern template int launch_of<T, kDoubleBackward>(const Call&, Stream);
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
  return of_type(type, [&](auto t) { return launch_of<decltype(t), kForward>(call, stream); });
}
int launch_backward(const Call& call, Type type, Stream stream) {
  return of_type(type, [&](auto t) { return launch_of<decltype(t), kBackward>(call, stream); });
}
int launch_double_backward(const Call& call, Type type, Stream stream) {
  return of_type(type, [&](auto t) { return launch_of<decltype(t), kDoubleBackward>(call, stream); });
}
int launch_tables(const Call& call, Stream stream) {
  const dim3 grid(static_cast<unsigned>(call.tables.channels * call.tables.count));
  return launch(table_kernel, grid, kTableThreads, 0, stream, call);
}
int launch_reduction(const Call& call, Type type, Stream stream) {
  int64_t outputs = 0;
  for (const Gradient* g : {&call.dalpha, &call.ddictionary, &call.dgamma}) outputs += g->rows * g->size;
  const dim3 grid(static_cast<unsigned>((outputs + kThreads / 32 - 1) / (kThreads / 32)));
  return launch(type == Type::f64 ? reduce_kernel<double> : reduce_kernel<float>, grid, kThreads, 0, stream, call);
}

Uniform uniform(double boundary, int64_t size) {
  const double step = size > 1 ? 2 * boundary / (size - 1) : 1;
  return {split<float>(step), split<float>(1 / step), split<float>(2 * step * 1.4426950408889634)};
}

}  // namespace kaf
