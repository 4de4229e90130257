// Loops for AVX2, FMA and F16C: eight floats at a time.
#include "plan.h"

#if defined(__x86_64__) && defined(__GNUC__)
// Everything from the standard library comes before the pragma: its inline functions must not be compiled for AVX2, or
// the linker may keep that copy for the whole program.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace kaf {
namespace avx2 {
namespace {

struct V {
  using Int = __m256i;
  static constexpr int kWidth = 8;
  static constexpr bool kPermutes = false;
  __m256 m;

  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a.m); }
  // The first n lanes; the others are 0, or stay in memory as they are.
  static V load_some(const float* p, int n) {
    return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(set_int(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))};
  }
  static void store_some(float* p, V a, int n) {  // a masked store takes many times longer than these
    if (n & 8) return store(p, a);
    __m128 rest = _mm256_castps256_ps128(a.m);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(a.m, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  static void store_int(uint32_t* p, Int a) { _mm256_storeu_si256(reinterpret_cast<Int*>(p), a); }
  static Int load_int(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(p)); }
  template <int N> static Int shift_left(Int a) { return _mm256_slli_epi32(a, N); }
  static V set(float a) { return {_mm256_set1_ps(a)}; }
  static V add(V a, V b) { return {_mm256_add_ps(a.m, b.m)}; }
  static V sub(V a, V b) { return {_mm256_sub_ps(a.m, b.m)}; }
  static V mul(V a, V b) { return {_mm256_mul_ps(a.m, b.m)}; }
  static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.m, b.m, c.m)}; }
  static V fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.m, b.m, c.m)}; }
  static V min(V a, V b) { return {_mm256_min_ps(a.m, b.m)}; }
  static V max(V a, V b) { return {_mm256_max_ps(a.m, b.m)}; }
  static Int bits(V a) { return _mm256_castps_si256(a.m); }
  static Int set_int(int32_t a) { return _mm256_set1_epi32(a); }
  static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int sub_int(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static Int min_unsigned(Int a, Int b) { return _mm256_min_epu32(a, b); }
  static Int max_unsigned(Int a, Int b) { return _mm256_max_epu32(a, b); }

  using Mask = __m256;
  static Mask within(Int a, Int first, Int span) {  // first ≤ a ≤ first + span
    const Int beyond = sub_int(a, first);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(min_unsigned(beyond, span), beyond));
  }
  static bool all(Mask m) { return _mm256_movemask_ps(m) == 0xff; }
  static V select(Mask m, V yes, V no) { return {_mm256_blendv_ps(no.m, yes.m, m)}; }
  static Int select_int(Mask m, Int yes, Int no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }
  static V step(V a, V b) {  // 1 where a > b or one is NaN, else 0
    return {_mm256_and_ps(_mm256_cmp_ps(a.m, b.m, _CMP_NLE_UQ), _mm256_set1_ps(1))};
  }

  // Lane l: step · (l mod count), count a power of two.
  static Int steps(int32_t step, int32_t count) {
    const Int lane = _mm256_and_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), set_int(count - 1));
    return _mm256_mullo_epi32(lane, set_int(step));
  }

  static V lookup(Int, V low, V) { return low; }  // kPermutes is false

  // out[m] = float m of each of 8 rows of at least four, in order; row(l) is where row l begins.
  template <class F> KAF_FN static void quads_of(F row, V* out) {
    __m256 r[4];
    KAF_UNROLL
    for (int j = 0; j < 4; ++j)  // rows j, j + 4 side by side
      r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row(j))), _mm_loadu_ps(row(j + 4)), 1);
    const __m256 low01 = _mm256_unpacklo_ps(r[0], r[1]), high01 = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 low23 = _mm256_unpacklo_ps(r[2], r[3]), high23 = _mm256_unpackhi_ps(r[2], r[3]);
    out[0].m = _mm256_shuffle_ps(low01, low23, 0x44);
    out[1].m = _mm256_shuffle_ps(low01, low23, 0xee);
    out[2].m = _mm256_shuffle_ps(high01, high23, 0x44);
    out[3].m = _mm256_shuffle_ps(high01, high23, 0xee);
  }

  // dst[i][l] = (a, b, c, d) of lane 4 l + i.
  static void store_quads(float* dst, V a, V b, V c, V d) {
    const __m256 ab0 = _mm256_unpacklo_ps(a.m, b.m), ab1 = _mm256_unpackhi_ps(a.m, b.m);
    const __m256 cd0 = _mm256_unpacklo_ps(c.m, d.m), cd1 = _mm256_unpackhi_ps(c.m, d.m);
    _mm256_store_ps(dst, _mm256_shuffle_ps(ab0, cd0, 0x44));
    _mm256_store_ps(dst + 8, _mm256_shuffle_ps(ab0, cd0, 0xee));
    _mm256_store_ps(dst + 16, _mm256_shuffle_ps(ab1, cd1, 0x44));
    _mm256_store_ps(dst + 24, _mm256_shuffle_ps(ab1, cd1, 0xee));
  }

  // row += (quad, quad · fourth)
  static void add_row(char* at, const float* quad, const float* fourth) {
    float* row = reinterpret_cast<float*>(at);
    const __m256 q = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(quad));
    const __m256 f = _mm256_blend_ps(_mm256_set1_ps(1), _mm256_broadcast_ss(fourth), 0xf0);
    _mm256_storeu_ps(row, _mm256_fmadd_ps(q, f, _mm256_loadu_ps(row)));
  }

  static V load_half(const uint16_t* p, Type type) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (type == Type::f16) return {_mm256_cvtph_ps(h)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static void store_half(uint16_t* p, V a, Type type) {
    __m128i h;
    if (type == Type::f16) {
      h = _mm256_cvtps_ph(a.m, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const Int b = bits(a), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
      const Int rounded = _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
      const Int nan = _mm256_castps_si256(_mm256_cmp_ps(a.m, a.m, _CMP_UNORD_Q));
      const Int top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
      h = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
  }
};

}  // namespace
}  // namespace avx2
}  // namespace kaf

#define KAF_ISA avx2
#include "loops.inl"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
