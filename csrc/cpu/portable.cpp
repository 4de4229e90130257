// Loops in plain C++ for any processor.
#include <cstddef>
#include <type_traits>

#include "plan.h"

#define KAF_SCALAR
#define KAF_ISA portable
#include "loops.inl"
