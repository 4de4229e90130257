#include "kernels.cuh"

namespace kaf {

template int launch_of<float16, kForward>(const Call&, Stream);
template int launch_of<float16, kBackward>(const Call&, Stream);
template int launch_of<float16, kDoubleBackward>(const Call&, Stream);

}  // namespace kaf
