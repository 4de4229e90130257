// Loops for AVX-512 (F, BW, DQ, VL): sixteen floats at a time, tables of 32 cells looked up by permutes, and held in
// registers along a channel's row.
//
// Operations for 16 elements of a row with such a table: place 6, lookups 8, polynomial 7, load and store 2. The
// lookups and half of the rest share the two vector ports, so an evaluation takes about 11 cycles, which moves 128
// bytes. A gradient sum takes 8 more to prepare 16 elements and 4 loads, 2 operations and 1 store for each.
#include "plan.h"

#if defined(__x86_64__) && defined(__GNUC__)
// Everything from the standard library comes before the pragma: its inline functions must not be compiled for AVX-512,
// or the linker may keep that copy for the whole program.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace kaf {
namespace avx512 {
namespace {

struct V {
  using Int = __m512i;
  static constexpr int kWidth = 16;
  static constexpr bool kPermutes = true;
  __m512 m;

  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a.m); }
  // The first n lanes; the others are 0, or stay in memory as they are.
  static V load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps((1u << n) - 1, p)}; }
  static void store_some(float* p, V a, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, a.m); }
  static void store_int(uint32_t* p, Int a) { _mm512_storeu_si512(p, a); }
  static Int load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
  template <int N> static Int shift_left(Int a) { return _mm512_slli_epi32(a, N); }
  static V set(float a) { return {_mm512_set1_ps(a)}; }
  static V add(V a, V b) { return {_mm512_add_ps(a.m, b.m)}; }
  static V sub(V a, V b) { return {_mm512_sub_ps(a.m, b.m)}; }
  static V mul(V a, V b) { return {_mm512_mul_ps(a.m, b.m)}; }
  static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.m, b.m, c.m)}; }
  static V fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.m, b.m, c.m)}; }
  static V min(V a, V b) { return {_mm512_min_ps(a.m, b.m)}; }
  static V max(V a, V b) { return {_mm512_max_ps(a.m, b.m)}; }
  static Int bits(V a) { return _mm512_castps_si512(a.m); }
  static Int set_int(int32_t a) { return _mm512_set1_epi32(a); }
  static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int sub_int(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static Int min_unsigned(Int a, Int b) { return _mm512_min_epu32(a, b); }
  static Int max_unsigned(Int a, Int b) { return _mm512_max_epu32(a, b); }

  using Mask = __mmask16;
  static Mask within(Int a, Int first, Int span) {  // first ≤ a ≤ first + span
    return _mm512_cmple_epu32_mask(sub_int(a, first), span);
  }
  static bool all(Mask m) { return m == 0xffff; }
  static V select(Mask m, V yes, V no) { return {_mm512_mask_mov_ps(no.m, m, yes.m)}; }
  static Int select_int(Mask m, Int yes, Int no) { return _mm512_mask_mov_epi32(no, m, yes); }
  static V step(V a, V b) {  // 1 where a > b or one is NaN, else 0
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.m, b.m, _CMP_NLE_UQ), _mm512_set1_ps(1))};
  }

  // Lane l: step · (l mod count), count a power of two.
  static Int steps(int32_t step, int32_t count) {
    const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(_mm512_and_si512(lane, set_int(count - 1)), set_int(step));
  }

  // Entry `index mod 32` of the table (low, high).
  static V lookup(Int index, V low, V high) { return {_mm512_permutex2var_ps(low.m, index, high.m)}; }

  // out[m] = float m of each of 16 rows of at least four, in order; row(l) is where row l begins.
  template <class F> KAF_FN static void quads_of(F row, V* out) {
    __m512 r[4];
    KAF_UNROLL
    for (int j = 0; j < 4; ++j) {  // rows j, j + 4, j + 8, j + 12 side by side
      r[j] = _mm512_castps128_ps512(_mm_loadu_ps(row(j)));
      r[j] = _mm512_insertf32x4(r[j], _mm_loadu_ps(row(j + 4)), 1);
      r[j] = _mm512_insertf32x4(r[j], _mm_loadu_ps(row(j + 8)), 2);
      r[j] = _mm512_insertf32x4(r[j], _mm_loadu_ps(row(j + 12)), 3);
    }
    const __m512 low01 = _mm512_unpacklo_ps(r[0], r[1]), high01 = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 low23 = _mm512_unpacklo_ps(r[2], r[3]), high23 = _mm512_unpackhi_ps(r[2], r[3]);
    out[0].m = _mm512_shuffle_ps(low01, low23, 0x44);
    out[1].m = _mm512_shuffle_ps(low01, low23, 0xee);
    out[2].m = _mm512_shuffle_ps(high01, high23, 0x44);
    out[3].m = _mm512_shuffle_ps(high01, high23, 0xee);
  }

  // r[i][j] and r[j][i] change places.
  static void transpose(V (&r)[16]) {
    V t[16];
    KAF_UNROLL
    for (int i = 0; i < 16; i += 4) {  // 4 × 4 within each quarter
      const __m512 low01 = _mm512_unpacklo_ps(r[i].m, r[i + 1].m), high01 = _mm512_unpackhi_ps(r[i].m, r[i + 1].m);
      const __m512 low23 = _mm512_unpacklo_ps(r[i + 2].m, r[i + 3].m);
      const __m512 high23 = _mm512_unpackhi_ps(r[i + 2].m, r[i + 3].m);
      t[i].m = _mm512_shuffle_ps(low01, low23, 0x44);
      t[i + 1].m = _mm512_shuffle_ps(low01, low23, 0xee);
      t[i + 2].m = _mm512_shuffle_ps(high01, high23, 0x44);
      t[i + 3].m = _mm512_shuffle_ps(high01, high23, 0xee);
    }
    KAF_UNROLL
    for (int i = 0; i < 4; ++i) {  // then the quarters
      const __m512 even01 = _mm512_shuffle_f32x4(t[i].m, t[i + 4].m, 0x88);
      const __m512 odd01 = _mm512_shuffle_f32x4(t[i].m, t[i + 4].m, 0xdd);
      const __m512 even23 = _mm512_shuffle_f32x4(t[i + 8].m, t[i + 12].m, 0x88);
      const __m512 odd23 = _mm512_shuffle_f32x4(t[i + 8].m, t[i + 12].m, 0xdd);
      r[i].m = _mm512_shuffle_f32x4(even01, even23, 0x88);
      r[i + 4].m = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
      r[i + 8].m = _mm512_shuffle_f32x4(even01, even23, 0xdd);
      r[i + 12].m = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
  }

  // dst[i][l] = (a, b, c, d) of lane 4 l + i.
  static void store_quads(float* dst, V a, V b, V c, V d) {
    const __m512 ab0 = _mm512_unpacklo_ps(a.m, b.m), ab1 = _mm512_unpackhi_ps(a.m, b.m);
    const __m512 cd0 = _mm512_unpacklo_ps(c.m, d.m), cd1 = _mm512_unpackhi_ps(c.m, d.m);
    _mm512_store_ps(dst, _mm512_shuffle_ps(ab0, cd0, 0x44));
    _mm512_store_ps(dst + 16, _mm512_shuffle_ps(ab0, cd0, 0xee));
    _mm512_store_ps(dst + 32, _mm512_shuffle_ps(ab1, cd1, 0x44));
    _mm512_store_ps(dst + 48, _mm512_shuffle_ps(ab1, cd1, 0xee));
  }

  // row += (quad, quad · fourth)
  static void add_row(char* at, const float* quad, const float* fourth) {
    float* row = reinterpret_cast<float*>(at);
    const __m256 q = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(quad));
    const __m256 f = _mm256_blend_ps(_mm256_set1_ps(1), _mm256_broadcast_ss(fourth), 0xf0);
    _mm256_storeu_ps(row, _mm256_fmadd_ps(q, f, _mm256_loadu_ps(row)));
  }

  static V load_half(const uint16_t* p, Type type) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (type == Type::f16) return {_mm512_cvtph_ps(h)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static void store_half(uint16_t* p, V a, Type type) {
    __m256i h;
    if (type == Type::f16) {
      h = _mm512_cvtps_ph(a.m, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const Int b = bits(a), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
      const Int rounded = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask(a.m, a.m, _CMP_UNORD_Q);
      const Int marked = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
      h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(marked, 16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  }
};

}  // namespace
}  // namespace avx512
}  // namespace kaf

#define KAF_ISA avx512
#include "loops.inl"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
