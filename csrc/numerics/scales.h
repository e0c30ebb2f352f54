// How scale and zero_point follow from the extremes of x.
#pragma once

#include "formats.h"

namespace quantkit {

// How a scale is rounded to a power of two, and as what it is stored.
enum class Rule : int32_t { none, ceil, floor, even };
enum class Stored : int32_t { number, e8m0, e4m3 };

struct Scheme {
  int32_t q_min, q_max;
  bool symmetric, include_zero;
  bool extremes;  // no parameters: min x and max x stand in place of scale and zero_point
  double steps;   // what the extent is divided by
  double eps;
  // Of contract 2's symmetric scales.
  Rule rule;
  Stored stored;
  int32_t half;      // added to the bits of max |x| by the rule "even": half of the last bit kept
  int32_t exponent;  // of q_max rounded down to a power of two
};

namespace {

// eps in P, for half precision through float.
template <class P>
QK_INLINE Wide<P> smallest_scale(double eps) {
  return rounded<P>(Wide<P>(eps));
}

// A scale raised to eps. NaN stays NaN.
template <class P>
QK_INLINE Wide<P> raised(Wide<P> scale, const Scheme& s) {
  const Wide<P> least = smallest_scale<P>(s.eps);
  return scale < least ? least : scale;
}
// extent / steps in P, raised to eps; the steps are never rounded to half precision.
template <class P>
QK_INLINE Wide<P> scale_of(Wide<P> extent, const Scheme& s) {
  return raised<P>(rounded<P>(extent / Wide<P>(s.steps)), s);
}
template <class P>
QK_INLINE Wide<P> asymmetric_scale(Wide<P>& x_min, Wide<P> x_max, const Scheme& s) {
  if (s.include_zero) {  // a NaN fails both comparisons and stays
    x_min = x_min > 0 ? 0 : x_min;
    x_max = x_max < 0 ? 0 : x_max;
  }
  return scale_of<P>(rounded<P>(x_max - x_min), s);
}
template <class P>
QK_INLINE Wide<P> asymmetric_zero_point(Wide<P> x_min, Wide<P> scale, const Scheme& s) {
  const Wide<P> quotient = rounded<P>(x_min / scale);
  const Wide<P> q_min = Wide<P>(s.q_min), q_max = Wide<P>(s.q_max);
  // Integral values from 2^(mantissa bits) on: nothing to round, and clipping decides before that.
  const bool small = (quotient > -0x1p21f) & (quotient < 0x1p21f);
  const Wide<P> round = small ? (quotient + kShifter<Wide<P>>)-kShifter<Wide<P>> : quotient;
  const Wide<P> zero_point = rounded<P>(q_min - round);
  return zero_point != zero_point ? zero_point : clamp(zero_point, q_min, q_max);
}

// ---- symmetric scales that are stored as another number than the steps use ----------------------

// By a rule, the code of E8M0 for max |x| (contract 2, section 3).
template <Rule kRule>
QK_INLINE int32_t power_code(float max_abs, const Scheme& s) {
  constexpr int32_t kInfinity = 0x7f800000;
  const int32_t bits = bit_cast<int32_t>(max_abs);
  int32_t code;
  if constexpr (kRule == Rule::ceil) {
    const int32_t scale = bit_cast<int32_t>(scale_of<float>(max_abs, s));
    code = scale <= 1 << 22 ? 0 : (scale >> 23) + ((scale & 0x7fffff) != 0);
  } else {
    static_assert(kRule == Rule::floor || kRule == Rule::even, "a rule without its formula");
    const int32_t half = kRule == Rule::even ? s.half : 0;
    const int32_t least = bit_cast<int32_t>(smallest_scale<float>(s.eps)) >> 23;
    code = int32_t((uint32_t(bits) + uint32_t(half)) >> 23) - s.exponent;
    code = code < least ? least : code;
  }
  code = code < 0 ? 0 : code > 254 ? 254 : code;
  return bits > kInfinity ? 255 : bits == kInfinity ? 254 : code;
}

// A scale as it is stored, a number's bits or a code, and as the steps use it.
struct StoredScale {
  int32_t bits;
  float used;
};
// How scales of a scheme are made, in bits of type T: those of a float, or a code. `global` is 1
// where there is none, exact either way.
template <Rule kRule, class T>
struct PowerScale {
  using Bits = T;
  QK_INLINE static StoredScale of(float max_abs, float, const Scheme& s) {
    const int32_t code = power_code<kRule>(max_abs, s);
    const float power = power_of_two(code);
    return {sizeof(T) == 1 ? code : bit_cast<int32_t>(power), power};
  }
};
template <class T>
struct DividedScale {
  using Bits = T;
  QK_INLINE static StoredScale of(float max_abs, float global, const Scheme& s) {
    const float scale = raised<float>(max_abs / float(s.steps) / global, s);
    if constexpr (sizeof(T) > 1) return {bit_cast<int32_t>(scale), scale * global};
    using Code = StructOf<Format::float8_e4m3fn>::type;
    const Encoded<float> made = Code::encode(scale, Code::kLow, Code::kHigh, scale);
    return {made.code, made.number * global};
  }
};

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of these.
template <class F>
QK_INLINE auto with_stored(const Scheme& s, F f) {
  const bool code = s.stored != Stored::number;
  switch (s.rule) {
    case Rule::none:
      return code ? f(Tag<DividedScale<uint8_t>>()) : f(Tag<DividedScale<int32_t>>());
    case Rule::ceil:
      return code ? f(Tag<PowerScale<Rule::ceil, uint8_t>>())
                  : f(Tag<PowerScale<Rule::ceil, int32_t>>());
    case Rule::floor:
      return code ? f(Tag<PowerScale<Rule::floor, uint8_t>>())
                  : f(Tag<PowerScale<Rule::floor, int32_t>>());
    case Rule::even:
      return code ? f(Tag<PowerScale<Rule::even, uint8_t>>())
                  : f(Tag<PowerScale<Rule::even, int32_t>>());
  }
  __builtin_unreachable();
}
QK_INLINE int64_t size_of(Stored stored) { return stored == Stored::number ? 4 : 1; }

}  // namespace
}  // namespace quantkit
