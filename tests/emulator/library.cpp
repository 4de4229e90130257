// The library that the emulated kernels are registered in: the operators' own schemas, under another name.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kafops_emulated, m) {
#define KAF_OPERATOR(schema) m.def(schema);
#include "../../kafops/schemas.inc"
}
