// Reductions that choose parameters: extremes of integer keys, so that no order of the elements
// matters.
//
// The state of a reduction is kKeys integers, each kept in an array of its own where there are many
// states: loops over columns then vectorise. `first` is the state before any element, `take` an
// element's, `join` that of two, `finalize` makes the parameters.
#pragma once

#include "scales.h"

namespace quantkit {
namespace {

// All bits but the sign: the greatest key.
template <class T>
constexpr typename Traits<T>::Bits kMagnitude =
    static_cast<typename Traits<T>::Bits>((uint64_t(1) << (sizeof(T) * 8 - 1)) - 1);

// Keys are ordered as the values are, with every NaN above (or below) the infinities and -0.0 below
// 0.0: a NaN wins by itself.
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

template <class K>
QK_INLINE K larger(K a, K b) {
  return a > b ? a : b;
}
template <class K>
QK_INLINE K lesser(K a, K b) {
  return a < b ? a : b;
}

// max |x|, for the symmetric scheme.
template <class X>
struct AbsMax {
  using Bits = typename Traits<X>::Bits;
  static constexpr int kKeys = 1;

  template <int k>
  QK_INLINE static Bits first() {
    return Bits(-kMagnitude<X> - 1);
  }
  template <int k>
  QK_INLINE static Bits take(X x) {
    return magnitude_key(x);
  }
  template <int k, class Key>
  QK_INLINE static Key join(Key a, Key b) {
    return larger(a, b);
  }
  // What finalize() makes a scale of.
  template <class P>
  QK_INLINE static Wide<P> extreme(const Bits* keys) {
    return static_cast<Wide<P>>(widen(bit_cast<X>(keys[0])));
  }
  template <class P>
  QK_INLINE static void finalize(const Bits* keys, const Scheme& s, P& scale, P& zero_point) {
    scale = narrow<P>(scale_of<P>(extreme<P>(keys), s));
    zero_point = narrow<P>(0);
  }
};

// max x and min x, for the asymmetric scheme.
template <class X>
struct MinMax {
  using Bits = typename Traits<X>::Bits;
  static constexpr int kKeys = 2;

  template <int k>
  QK_INLINE static Bits first() {
    return k == 0 ? Bits(-kMagnitude<X> - 1) : kMagnitude<X>;
  }
  template <int k>
  QK_INLINE static Bits take(X x) {
    return order_key(x);
  }
  template <int k, class Key>
  QK_INLINE static Key join(Key a, Key b) {
    return k == 0 ? larger(a, b) : lesser(a, b);
  }
  template <class P>
  QK_INLINE static void finalize(const Bits* keys, const Scheme& s, P& scale, P& zero_point) {
    Wide<P> x_min = static_cast<Wide<P>>(widen(from_order_key<X>(keys[1])));
    const Wide<P> x_max = static_cast<Wide<P>>(widen(from_order_key<X>(keys[0])));
    const Wide<P> chosen = asymmetric_scale<P>(x_min, x_max, s);
    scale = narrow<P>(chosen);
    zero_point = narrow<P>(asymmetric_zero_point<P>(x_min, chosen, s));
  }
};

// These as results, min x in place of the scale. One NaN, of either sign, makes both NaN.
template <class X>
struct Extremes : MinMax<X> {
  template <class P>
  QK_INLINE static void finalize(const typename MinMax<X>::Bits* keys, const Scheme&, P& x_min,
                                 P& x_max) {
    const Wide<P> low = static_cast<Wide<P>>(widen(from_order_key<X>(keys[1])));
    const Wide<P> high = static_cast<Wide<P>>(widen(from_order_key<X>(keys[0])));
    const bool ordered = (low == low) & (high == high);
    x_min = narrow<P>(ordered ? low : Wide<P>(__builtin_nanf("")));
    x_max = narrow<P>(ordered ? high : Wide<P>(__builtin_nanf("")));
  }
};

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of the reduction that a scheme takes: of extremes that of MinMax, whose loops
// are the same.
template <class X, class F>
QK_INLINE auto with_reduction(const Scheme& scheme, F f) {
  return scheme.symmetric ? f(Tag<AbsMax<X>>()) : f(Tag<MinMax<X>>());
}

}  // namespace
}  // namespace quantkit
