// The affine map and its inverse: x / scale + zero_point and (q - zero_point) * scale.
#pragma once

#include "floats.h"

namespace quantkit {

// The dtypes that the steps round to: two to the code, two back. The last is that of the result.
struct Steps {
  Type divide, add, subtract, multiply;
  // The quotient becomes an integer before the zero point is added; steps are f32.
  bool round_first;

  QK_INLINE bool there_in(Type type) const { return divide == type && add == type; }
  QK_INLINE bool back_in(Type type) const { return subtract == type && multiply == type; }
};

namespace {

// A dtype of quotients that are rounded to integers, half to even.
struct whole {};
template <>
struct Traits<whole> {
  using Wide = float;
};
template <>
QK_INLINE float rounded<whole>(float v) {
  const bool small = (v > -0x1p22f) & (v < 0x1p22f);  // others are integers, or NaN
  return small ? (v + kShifter<float>)-kShifter<float> : v;
}
template <>
QK_INLINE float rounded_for_code<whole>(float v) {
  return rounded<whole>(v);
}
// The dtype of the sum after that of the quotient.
template <class D>
struct SumOf : Tag<D> {};
template <>
struct SumOf<whole> : Tag<float> {};

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

// (q - zero_point) * scale: the difference in E1, the product in E2.
template <class E1, class E2>
QK_INLINE E2 dequantized(float q, E1 zero_point, E2 scale) {
  return E2(E1(q) - zero_point) * scale;
}

// A sum of products of codes of two tensors, as a number.
QK_INLINE float scaled_sum(int32_t sum, float x_scale, float scale) {
  return float(sum) * x_scale * scale;
}

// The steps one by one, for dtypes known at run time: in double, which holds the values of all of
// them. A zero point is rounded to the dtype of the sum first; a scale is taken in full.
template <class D>
QK_INLINE double quotient_in(double x, double scale) {
  return rounded<D>(Wide<D>(x) / Wide<D>(scale));
}
template <class D>
QK_INLINE double sum_in(double quotient, double zero_point) {
  return rounded<D>(Wide<D>(quotient) + rounded<D>(Wide<D>(zero_point)));
}
QK_INLINE double dequantized_in(const Steps& steps, float q, double zero_point, double scale) {
  if (steps.subtract == Type::f64) return dequantized<double, double>(q, zero_point, scale);
  if (steps.multiply == Type::f64) return dequantized<float, double>(q, float(zero_point), scale);
  return dequantized<float, float>(q, float(zero_point), float(scale));
}

}  // namespace
}  // namespace quantkit
