// Division by a scale that many elements share: reciprocals, and when their products have a
// quotient's bits.
#pragma once

#include "floats.h"

namespace quantkit {
namespace {

// Where a reciprocal and its low part are normal numbers.
QK_INLINE bool has_reciprocal(float scale) { return scale >= 0x1p-60f && scale <= 0x1p60f; }

// 1 / scale, where for every x of half precision T x * (1 / scale) rounds to T as x / scale does;
// else 0. With scale of T too: between significands of p bits (8 or 11) a quotient is never half
// way between two numbers of T, and differs from there by 2^-(2p + 1) of itself or more; the
// product is nearer to it (all pairs: tests/test_division.py). The code is then that of
// affine_for_code(), which has a condition more.
template <class T>
QK_INLINE float reciprocal_for_code(float scale, float zero_point) {
  const bool integer = (zero_point >= -1024) & (zero_point <= 1024) &
                       ((zero_point + 0x1.8p23f) - 0x1.8p23f == zero_point);
  return has_reciprocal(scale) & integer & (rounded<T>(scale) == scale) ? 1.0f / scale : 0.0f;
}

#ifndef __CUDACC__  // a GPU divides
#if !defined(QUANTKIT_TRUE_DIVISION) && (defined(__FMA__) || defined(__aarch64__))
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// 1 / scale in two parts: x / scale without a division (Brisebarre, Muller, Raina, "Accelerating
// correctly rounded floating-point division when the divisor is known in advance", IEEE Trans.
// Computers 2004).
struct Reciprocal {
  float high, low;
};

QK_INLINE float quotient(float x, Reciprocal r) { return __builtin_fmaf(x, r.high, x * r.low); }

// x / scale for every scale that has_reciprocal() and every x with a finite quotient, but the
// tiniest: below 2^-40 either way. With r.high correctly rounded and quotient() within a unit in
// the last place, the remainder is exact and one step from it gives the correctly rounded quotient
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", IBM J.
// Res. Dev. 1990).
QK_INLINE float corrected_quotient(float x, float scale, Reciprocal r) {
  const float q = quotient(x, r);
  return __builtin_fmaf(__builtin_fmaf(-q, scale, x), r.high, q);
}
QK_INLINE Reciprocal nearest_reciprocal(float scale) {
  const float high = 1.0f / scale;
  return {high, __builtin_fmaf(-scale, high, 1.0f) * high};
}

// Whether quotient(x, r) is x / scale for every x but the tiniest, whose quotient is below 2^-70
// either way; NaN, infinities and overflow as the division gives them. Proof and sweep:
// docs/performance.md.
QK_INLINE bool exact_reciprocal(float scale, Reciprocal& r) {
  if (!has_reciprocal(scale)) return false;
  const uint32_t bits = bit_cast<uint32_t>(scale), fraction = bits & 0x7fffffu;
  const float s = bit_cast<float>(fraction | 0x3f800000u);  // scale's significand
  // high below 1 / s, so that low is positive: x * high and x * low overflow to the same infinity.
  float high = 1.0f / s;
  float rest = __builtin_fmaf(-s, high, 1.0f);
  if (rest <= 0) {
    high = bit_cast<float>(bit_cast<uint32_t>(high) - 1);
    rest = __builtin_fmaf(-s, high, 1.0f);
  }
  const Reciprocal unit = {high, rest / s};
  // The value rounded is x / s within 2^-46 of itself. It can round otherwise only where a midpoint
  // of two floats, an odd m of 25 bits, lies that near: x 2^a = m s + k, 0 < |k| <= 8 in units of
  // the last place, a 24 or 25. For each k there is one m modulo 2^24 (fewer bits for even s): try
  // them all.
  const uint32_t whole = fraction | 0x800000u;
  const int32_t zeros = __builtin_ctz(whole);
  const uint32_t odd = whole >> zeros, step = 0x1000000u >> zeros;
  uint32_t inverse = odd * (2 - odd * odd);
  for (int i = 0; i < 3; ++i) inverse *= 2 - odd * inverse;
  bool exact = true;
  const int32_t most = 8 >> zeros;
  for (int32_t k = 1 - most - (most & 1); k <= most; k += 2) {
    uint32_t m = (-uint32_t(k) * inverse & (step - 1)) | 0x1000000u;
    for (; m < 0x2000000u; m += step) {
      const int64_t x = (int64_t(m) * odd + k) >> (24 - zeros);
      const float candidate = float(int32_t(x));  // where x has 25 bits, half of it tests the same
      exact &= quotient(candidate, unit) == candidate / s;
    }
  }
  const float power = bit_cast<float>((254u << 23) - (bits & 0x7f800000u));
  r = {unit.high * power, unit.low * power};
  return exact;
}
#endif

}  // namespace
}  // namespace quantkit
