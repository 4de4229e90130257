#include "kernels.cuh"

namespace kaf {

template int launch_of<float, kForward>(const Call&, Stream);
template int launch_of<float, kBackward>(const Call&, Stream);
template int launch_of<float, kDoubleBackward>(const Call&, Stream);

}  // namespace kaf
