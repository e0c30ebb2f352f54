// How scale and zero_point follow from the extremes of x.
#pragma once

#include "floats.h"

namespace quantkit {

struct Scheme {
  int32_t q_min, q_max;
  bool symmetric, include_zero;
  double steps;  // what the extent is divided by
  double eps;
};

namespace {

// eps in P, for half precision through float.
template <class P>
QK_INLINE Wide<P> smallest_scale(double eps) {
  return rounded<P>(Wide<P>(eps));
}

// extent / steps in P, raised to eps; the steps are never rounded to half precision. NaN stays NaN.
template <class P>
QK_INLINE Wide<P> scale_of(Wide<P> extent, const Scheme& s) {
  const Wide<P> scale = rounded<P>(extent / Wide<P>(s.steps)), least = smallest_scale<P>(s.eps);
  return scale < least ? least : scale;
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

}  // namespace
}  // namespace quantkit
