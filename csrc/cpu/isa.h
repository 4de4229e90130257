// The instruction sets that the loops are compiled for, the best first: the name, and whether this machine runs it. A
// new one is a row here and a file of that name; setup.py, ops.cpp and the tests read the rows.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define KAF_X86(row) row
#define KAF_HAS(feature) __builtin_cpu_supports(feature)
#else
#define KAF_X86(row)
#endif

// clang-format off
#define KAF_ISAS(X)                                                                                              \
  KAF_X86(X(avx512, KAF_HAS("avx512f") && KAF_HAS("avx512bw") && KAF_HAS("avx512dq") && KAF_HAS("avx512vl") &&  \
                    KAF_HAS("avx2") && KAF_HAS("fma") && KAF_HAS("f16c")))                                       \
  KAF_X86(X(avx2, KAF_HAS("avx2") && KAF_HAS("fma") && KAF_HAS("f16c")))                                         \
  X(portable, true)
// clang-format on
