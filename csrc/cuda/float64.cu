#include "kernels.cuh"

namespace kaf {

template int forward_of<double>(const Call&, Stream);
template int backward_of<double>(const Call&, Stream);
template int double_backward_of<double>(const Call&, Stream);

}  // namespace kaf
