// All answers: bfloat16 has so few numbers that a block evaluates its curve once at each of them that matters.
//
// A number is a sign and 15 bits of magnitude, 128 to a power of two. From the first power beyond the last cell, where the
// curve is 0, down to 2^-20 of a cell, below which it is f(0) to a few roundings of its terms, are 27 powers for D = 20:
// 6,916 numbers. The answers are those of the cells, with the same bits, as float32: so one table serves y, and f′ that is
// to be multiplied by g.
//
// Counted on sm_90, with all that a block does once: forward 24 instructions an element where cells take 33, backward of x
// 35 and 42. A number costs some 35, which a block of 64 K elements shares. float16 has 18,000 magnitudes below 8, none of
// which may be left out: 144 KB.
#pragma once
#include "cells.cuh"

namespace kaf {

template <class T> constexpr bool kHasAnswers = std::is_same_v<T, bfloat16>;

struct Answers : Channel {
  const float* table;  // of magnitudes low … low + last, then of NaN; and again, with the other sign
  uint32_t low, last;

  __device__ __forceinline__ Answers(const Call& call, int64_t channel, const float* shared)
      : Channel(call, channel), table(shared) {
    const float edge = cells.width * (static_cast<float>(max(-cells.first, cells.first + cells.count - 2)) + 0.5f);
    const uint32_t end = ((__float_as_uint(edge) >> 23) + 1) << 7, powers = call.powers << 7;
    low = end > powers ? end - powers : 0;
    last = end - low;
  }

  template <int kThreads> static __device__ __forceinline__ void prepare(const Call& call, int64_t channel, float* shared) {
    const Tables& t = call.tables;
    const Answers a(call, channel, shared);
    const Curves<1> curves(call, channel, t.rows + channel * t.count * t.capacity * kCoefficients);
    const uint32_t entries = curves.cells.count > 0 ? a.last + 2 : 0;  // of a sign
    for (uint32_t i = threadIdx.x; i < 2 * entries; i += kThreads) {
      const uint32_t sign = i >= entries, magnitude = i - sign * entries;
      const uint32_t bits = magnitude == 0 ? 0 : magnitude <= a.last ? a.low + magnitude : 0x7fff;
      const float x = __uint_as_float((sign << 15 | bits) << 16);
      shared[i] = curves.polynomial(curves.find(curves.clamped(x)), 0);
    }
    __syncthreads();
  }
  // The first curve at x, which need not be clamped.
  __device__ __forceinline__ float operator()(bfloat16 x, float) const {
    const uint32_t bits = x.bits, magnitude = bits & 0x7fff;
    const uint32_t i = magnitude > 0x7f80 ? last + 1 : min(max(magnitude, low) - low, last);
    return table[i + (bits >> 15) * (last + 2)];
  }
};

}  // namespace kaf
