#include "kernels.cuh"

namespace kaf {

template int forward_of<float16>(const Call&, Stream);
template int backward_of<float16>(const Call&, Stream);
template int double_backward_of<float16>(const Call&, Stream);

}  // namespace kaf
