// The arithmetic of docs/numerics.md, once, for host and device. No torch, no SIMD, no standard library
// templates: everything here has internal linkage, so that no object built with one instruction set
// lends code to another. Compiled with -ffp-contract=off (nvcc: --fmad=false -prec-div=true -ftz=false).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QK_INLINE __host__ __device__ __forceinline__
#else
#define QK_INLINE [[maybe_unused]] inline
#endif

namespace quantkit {

// How parameters are chosen.
struct Scheme {
  int32_t q_min, q_max;
  bool symmetric, include_zero;
  double eps;
};

namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

struct boolean {
  uint8_t byte;  // torch takes any but 0 for true
};

template <class To, class From>
QK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- storage types and the type their arithmetic runs in ------------------------------------------

template <class T>
struct Traits;  // Wide: computes in it. Bits: of the same size as T.
template <>
struct Traits<f16> {
  using Wide = float;
  using Bits = int16_t;
};
template <>
struct Traits<bf16> {
  using Wide = float;
  using Bits = int16_t;
};
template <>
struct Traits<float> {
  using Wide = float;
  using Bits = int32_t;
};
template <>
struct Traits<double> {
  using Wide = double;
  using Bits = int64_t;
};
template <class T>
using Wide = typename Traits<T>::Wide;

template <class T>
QK_INLINE T widen(T v) {
  return v;
}
// Compilers convert a vector of these to float with an fma; of signed ones, with the plain instruction.
QK_INLINE int64_t widen(uint32_t v) { return v; }
QK_INLINE int32_t widen(boolean v) { return v.byte != 0; }
QK_INLINE float widen(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
QK_INLINE float widen(f16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu, sign = uint32_t(v.bits & 0x8000u) << 16;
  // A subnormal m is the float m * 2^-24: put m under the exponent of 0.5, take 0.5 away (exact).
  const float subnormal = bit_cast<float>(magnitude | 0x3f000000u) - 0.5f;
  const uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const uint32_t normal = (magnitude << 13) + exponent;
  return bit_cast<float>((magnitude < 0x400u ? bit_cast<uint32_t>(subnormal) : normal) | sign);
}

// v rounded to T (half to even, overflow to inf), still in the wide type. NaN stays NaN.
template <class T>
QK_INLINE Wide<T> rounded(Wide<T> v) {
  return v;
}
template <>
QK_INLINE float rounded<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const float r = bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);
  return v == v ? r : v;
}
template <>
QK_INLINE float rounded<f16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits & 0x80000000u;
  const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  // Adding 2^13 times v's power of two leaves float just the bits that float16 has; below 2^-14
  // float16 has a fixed step of 2^-24, which is what 0.5 leaves.
  const float power = bit_cast<float>((bits & 0x7f800000u) + (13u << 23));
  const float shifter = magnitude < 0x1p-14f ? 0.5f : power;
  const float r = (magnitude + shifter) - shifter;
  const float limited = magnitude >= 65520.0f ? __builtin_inff() : r;
  return bit_cast<float>(bit_cast<uint32_t>(limited) | sign);
}

// As rounded(), for what becomes a code beside an integer zero point of at most 2^10: there the steps of
// subnormal float16 and its infinity make no difference. NaN gives anything.
template <class T>
QK_INLINE Wide<T> rounded_for_code(Wide<T> v) {
  return v;
}
template <>
QK_INLINE float rounded_for_code<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  return bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);
}
template <>
QK_INLINE float rounded_for_code<f16>(float v) {
  const float shifter = bit_cast<float>((bit_cast<uint32_t>(v) & 0xff800000u) + (13u << 23));
  return (v + shifter) - shifter;
}

template <class T>
QK_INLINE T narrow(Wide<T> v) {
  return v;
}
template <>
QK_INLINE bf16 narrow<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t r = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return bf16{uint16_t(v == v ? r : 0x7fc0u)};
}
template <>
QK_INLINE f16 narrow<f16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000u;
  const uint32_t absolute = bits & 0x7fffffffu;
  const float magnitude = bit_cast<float>(absolute);
  const uint32_t normal = (absolute - 0x38000000u + 0xfffu + ((absolute >> 13) & 1)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000u;
  uint32_t r = absolute < 0x38800000u ? subnormal : normal;
  r = absolute >= 0x477ff000u ? 0x7c00u : r;
  r = absolute > 0x7f800000u ? 0x7e00u : r;
  return f16{uint16_t(r | sign)};
}

// ---- quantize and dequantize ----------------------------------------------------------------------

// x / scale + zero_point: the quotient rounded to D1, the sum to D2 (the dtypes of the two steps).
template <class D1, class D2>
QK_INLINE Wide<D2> affine(Wide<D1> quotient, Wide<D2> zero_point) {
  return rounded<D2>(Wide<D2>(rounded<D1>(quotient)) + zero_point);
}

// The same where it becomes a code and zero_point is an integer.
template <class D1, class D2>
QK_INLINE Wide<D2> affine_for_code(Wide<D1> quotient, Wide<D2> zero_point) {
  return rounded_for_code<D2>(Wide<D2>(rounded_for_code<D1>(quotient)) + zero_point);
}

// Where a reciprocal and its low part are normal numbers.
QK_INLINE bool has_reciprocal(float scale) { return scale >= 0x1p-60f && scale <= 0x1p60f; }

// 1 / scale, where for every x of half precision T x * (1 / scale) rounds to T as x / scale does; else 0. With
// scale of T too: between significands of p bits (8 or 11) a quotient is never half way between two
// numbers of T, and differs from there by 2^-(2p + 1) of itself or more; the product is nearer to it (all
// pairs: tests/test_division.py). The code is then that of affine_for_code(), which has a condition more.
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

// 1 / scale in two parts: x / scale without a division (Brisebarre, Muller, Raina, "Accelerating correctly
// rounded floating-point division when the divisor is known in advance", IEEE Trans. Computers 2004).
struct Reciprocal {
  float high, low;
};

QK_INLINE float quotient(float x, Reciprocal r) { return __builtin_fmaf(x, r.high, x * r.low); }

// x / scale for every scale that has_reciprocal() and every x with a finite quotient, but the tiniest: below
// 2^-40 either way. With r.high correctly rounded and quotient() within a unit in the last place, the
// remainder is exact and one step from it gives the correctly rounded quotient (Markstein, "Computation of
// elementary functions on the IBM RISC System/6000 processor", IBM J. Res. Dev. 1990).
QK_INLINE float corrected_quotient(float x, float scale, Reciprocal r) {
  const float q = quotient(x, r);
  return __builtin_fmaf(__builtin_fmaf(-q, scale, x), r.high, q);
}
QK_INLINE Reciprocal nearest_reciprocal(float scale) {
  const float high = 1.0f / scale;
  return {high, __builtin_fmaf(-scale, high, 1.0f) * high};
}

// Whether quotient(x, r) is x / scale for every x but the tiniest, whose quotient is below 2^-70 either
// way; NaN, infinities and overflow as the division gives them. Proof and sweep: docs/performance.md.
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
  // The value rounded is x / s within 2^-46 of itself. It can round otherwise only where a midpoint of
  // two floats, an odd m of 25 bits, lies that near: x 2^a = m s + k, 0 < |k| <= 8 in units of the last
  // place, a 24 or 25. For each k there is one m modulo 2^24 (fewer bits for even s): try them all.
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
      const float candidate = float(int32_t(x));  // where x has 25 bits, half of it is the same test
      exact &= quotient(candidate, unit) == candidate / s;
    }
  }
  const float power = bit_cast<float>((254u << 23) - (bits & 0x7f800000u));
  r = {unit.high * power, unit.low * power};
  return exact;
}
#endif

// 1.5 * 2^(mantissa bits): adding it to |v| < 2^22 rounds v half to even into the low mantissa bits.
template <class V>
struct Shifter;
template <>
struct Shifter<float> {
  static constexpr float value = 0x1.8p23f;
};
template <>
struct Shifter<double> {
  static constexpr double value = 0x1.8p52;
};

template <class V>
QK_INLINE V clamp(V v, V low, V high) {
  v = v > low ? v : low;
  return v < high ? v : high;
}

// clip(round(v), q_min, q_max), still above a Shifter, whose low bits are 0: those of the result are the
// code's. The limits are integers, so clipping first is the same. Not for NaN.
template <class V>
QK_INLINE V shifted_code(V v, V q_min, V q_max) {
  return clamp(v, q_min, q_max) + Shifter<V>::value;
}

// q_min <= round(v) <= q_max before clipping; false at NaN, which clamp() takes to q_min - 1.
template <class V>
QK_INLINE bool in_range(V v, V q_min, V q_max) {
  const V r = (clamp(v, q_min - 1, q_max + 1) + Shifter<V>::value) - Shifter<V>::value;
  return (r >= q_min) & (r <= q_max);
}

// (q - zero_point) * scale: the difference in E1, the product in E2.
template <class E1, class E2>
QK_INLINE E2 dequantized(float q, E1 zero_point, E2 scale) {
  return E2(E1(q) - zero_point) * scale;
}

// ---- choosing parameters --------------------------------------------------------------------------

// All bits but the sign: the greatest key.
template <class T>
constexpr typename Traits<T>::Bits kMagnitude =
    static_cast<typename Traits<T>::Bits>((uint64_t(1) << (sizeof(T) * 8 - 1)) - 1);

// Keys are integers ordered as the values are, with every NaN above (or below) the infinities and
// -0.0 below 0.0: maxima and minima of keys do not depend on the order, and a NaN wins by itself.
template <class T>
QK_INLINE typename Traits<T>::Bits magnitude_key(T v) {
  using Bits = typename Traits<T>::Bits;
  return Bits(bit_cast<Bits>(v) & kMagnitude<T>);
}
template <class T>
QK_INLINE typename Traits<T>::Bits order_key(T v) {
  using Bits = typename Traits<T>::Bits;
  const Bits bits = bit_cast<Bits>(v), sign = Bits(bits >> (sizeof(T) * 8 - 1));
  return Bits(bits ^ (sign & kMagnitude<T>));
}
template <class T>
QK_INLINE T from_order_key(typename Traits<T>::Bits key) {
  return bit_cast<T>(order_key<T>(bit_cast<T>(key)));  // the map is its own inverse
}

// eps in P, for half precision through float.
template <class P>
QK_INLINE Wide<P> smallest_scale(double eps) {
  return rounded<P>(Wide<P>(eps));
}

// extent / n in P, raised to eps; n is never rounded to half precision. NaN stays NaN.
template <class P>
QK_INLINE Wide<P> scale_of(Wide<P> extent, int32_t n, double eps) {
  const Wide<P> scale = rounded<P>(extent / Wide<P>(n > 1 ? n : 1)), least = smallest_scale<P>(eps);
  return scale < least ? least : scale;
}
template <class P>
QK_INLINE Wide<P> symmetric_scale(Wide<P> max_abs, const Scheme& s) {
  return scale_of<P>(max_abs, s.q_max, s.eps);
}
template <class P>
QK_INLINE Wide<P> asymmetric_scale(Wide<P>& x_min, Wide<P> x_max, const Scheme& s) {
  if (s.include_zero) {  // a NaN fails both comparisons and stays
    x_min = x_min > 0 ? 0 : x_min;
    x_max = x_max < 0 ? 0 : x_max;
  }
  return scale_of<P>(rounded<P>(x_max - x_min), s.q_max - s.q_min, s.eps);
}
template <class P>
QK_INLINE Wide<P> asymmetric_zero_point(Wide<P> x_min, Wide<P> scale, const Scheme& s) {
  const Wide<P> quotient = rounded<P>(x_min / scale);
  const Wide<P> q_min = Wide<P>(s.q_min), q_max = Wide<P>(s.q_max);
  // Integral values from 2^(mantissa bits) on: nothing to round, and clipping decides before that.
  const bool small = (quotient > -0x1p21f) & (quotient < 0x1p21f);
  const Wide<P> shifter = Shifter<Wide<P>>::value;
  const Wide<P> round = small ? (quotient + shifter) - shifter : quotient;
  const Wide<P> zero_point = rounded<P>(q_min - round);
  return zero_point != zero_point ? zero_point : clamp(zero_point, q_min, q_max);
}

// From the least and the greatest key of X (symmetric: from the greatest magnitude's) to parameters of type P.
template <class X, class P, bool kSymmetric>
QK_INLINE void parameters_of(typename Traits<X>::Bits low, typename Traits<X>::Bits high, const Scheme& s,
                             P& scale, P& zero_point) {
  if constexpr (kSymmetric) {
    const Wide<P> max_abs = static_cast<Wide<P>>(widen(bit_cast<X>(high)));
    scale = narrow<P>(symmetric_scale<P>(max_abs, s));
    zero_point = narrow<P>(0);
  } else {
    Wide<P> x_min = static_cast<Wide<P>>(widen(from_order_key<X>(low)));
    const Wide<P> x_max = static_cast<Wide<P>>(widen(from_order_key<X>(high)));
    const Wide<P> chosen = asymmetric_scale<P>(x_min, x_max, s);
    scale = narrow<P>(chosen);
    zero_point = narrow<P>(asymmetric_zero_point<P>(x_min, chosen, s));
  }
}

}  // namespace
}  // namespace quantkit
