// The CPU in place of the GPU: see csrc/cuda/device.cuh, whose functions these are.
#pragma once
#include "../../../../csrc/cuda/call.h"
#include "cuda_emulator.h"

namespace kaf {

inline float half_to_float(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}
inline uint16_t float_to_half(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline uint16_t float_to_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return v == v ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;  // to nearest, ties to even
}

inline float exp2_approx(float v) { return kaf_emulator::ex2_approx(v); }
inline float reciprocal_approx(float v) { return kaf_emulator::rcp_approx(v); }

template <class Kernel, class Argument>
int launch(Kernel kernel, dim3 grid, int threads, size_t shared, Stream, const Argument& argument) {
  kaf_emulator::launch(kernel, grid, dim3(threads), shared, argument);
  return 0;
}

}  // namespace kaf
