#include "kernels.cuh"

namespace kaf {

template int launch_of<double, kForward>(const Call&, Stream);
template int launch_of<double, kBackward>(const Call&, Stream);
template int launch_of<double, kDoubleBackward>(const Call&, Stream);

}  // namespace kaf
