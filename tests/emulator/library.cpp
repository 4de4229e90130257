// The library that the emulated kernels are registered in: the operators' own schemas, under another name.
#include <torch/csrc/stable/library.h>

#include "cuda_emulator.h"

STABLE_TORCH_LIBRARY(kafops_emulated, m) {
#define KAF_OPERATOR(schema) m.def(schema);
#include "../../kafops/schemas.inc"
}

// Kernels launched so far.
extern "C" __attribute__((visibility("default"))) uint64_t kafops_emulator_launches() {
  return kaf_emulator::state.launches;
}
