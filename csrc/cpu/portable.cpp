// Loops in plain C++ for any processor.
#include <cstddef>
#include <type_traits>

#include "plan.h"

#define KAF_SCALAR
#define KAF_ISA portable
#define KAF_LOOPS portable_loops
#define KAF_ISA_NAME "portable"
#include "loops.inl"
