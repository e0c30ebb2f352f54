// The innermost loops, written once as plain C++ that the compiler vectorises for the including file's
// instruction set: typed, branch-free, each over one contiguous run. Internal linkage, as all of this.
//
// What keeps a loop vectorised: __restrict, ternaries, integer keys for extrema, no libm.
#pragma once

#include "../kernels.h"

namespace quantkit {
namespace {

constexpr int64_t kChunk = 1024;  // elements of a scratch buffer; a few of them fit in L1

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- innermost loops ------------------------------------------------------------------------------

using QuantizeRun = void (*)(const void* x, void* out, const void* scale, const void* zero_point,
                             int64_t n, int32_t q_min, int32_t q_max);

// kEach: every element has its own parameters. Out: the code's type, or bool for "in range".
template <class X, class D1, class D2, class Out, bool kEach>
void quantize_run(const void* x_, void* out_, const void* scale_, const void* zero_point_, int64_t n,
                  int32_t q_min_, int32_t q_max_) {
  const X* __restrict x = static_cast<const X*>(x_);
  Out* __restrict out = static_cast<Out*>(out_);
  const Wide<D1>* __restrict scale = static_cast<const Wide<D1>*>(scale_);
  const Wide<D2>* __restrict zero_point = static_cast<const Wide<D2>*>(zero_point_);
  const Wide<D1> scale0 = scale[0];
  const Wide<D2> zero_point0 = zero_point[0];
  const Wide<D2> q_min = Wide<D2>(q_min_), q_max = Wide<D2>(q_max_);
  for (int64_t i = 0; i < n; ++i) {
    const Wide<D2> v = affine<D1, D2>(Wide<D1>(widen(x[i])), kEach ? scale[i] : scale0,
                                      kEach ? zero_point[i] : zero_point0);
    if constexpr (kSame<Out, bool>)
      out[i] = in_range(v, q_min, q_max);
    else
      out[i] = static_cast<Out>(code(v, q_min, q_max));
  }
}

using DequantizeRun = void (*)(const void* q, void* y, const void* scale, const void* zero_point,
                               int64_t n);

template <class Q, class E1, class E2, bool kEach>
void dequantize_run(const void* q_, void* y_, const void* scale_, const void* zero_point_, int64_t n) {
  const Q* __restrict q = static_cast<const Q*>(q_);
  E2* __restrict y = static_cast<E2*>(y_);
  const E2* __restrict scale = static_cast<const E2*>(scale_);
  const E1* __restrict zero_point = static_cast<const E1*>(zero_point_);
  const E2 scale0 = scale[0];
  const E1 zero_point0 = zero_point[0];
  for (int64_t i = 0; i < n; ++i)
    y[i] = dequantized<E1, E2>(static_cast<float>(q[i]), kEach ? zero_point[i] : zero_point0,
                               kEach ? scale[i] : scale0);
}

using ConvertRun = void (*)(const void* from, void* to, int64_t n);

// float64 reaches half precision through float32.
template <class From, class To>
void convert_run(const void* from_, void* to_, int64_t n) {
  const From* __restrict from = static_cast<const From*>(from_);
  To* __restrict to = static_cast<To*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(static_cast<Wide<To>>(widen(from[i])));
}

// to = keep ? from : 0, for any type of the size of Bits.
template <class Bits>
void select_run(const bool* __restrict keep, const void* from_, void* to_, int64_t n) {
  const Bits* __restrict from = static_cast<const Bits*>(from_);
  Bits* __restrict to = static_cast<Bits*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = keep[i] ? from[i] : Bits(0);
}

// Keys of x joined into low and high: into one pair (step 0), or into one pair for each element.
using ReduceRun = void (*)(const void* x, void* low, void* high, int64_t step, int64_t n);

template <class K>
K larger_key(K a, K b) { return a > b ? a : b; }
template <class K>
K lesser_key(K a, K b) { return a < b ? a : b; }

template <class X, class P, bool kSymmetric>
void reduce_run(const void* x_, void* low_, void* high_, int64_t step, int64_t n) {
  using Key = typename Traits<X>::Bits;
  using Kept = typename Traits<P>::Bits;
  const X* __restrict x = static_cast<const X*>(x_);
  Kept* __restrict low = static_cast<Kept*>(low_);
  Kept* __restrict high = static_cast<Kept*>(high_);
  if (step == 0) {
    Key least = static_cast<Key>(low[0]), most = static_cast<Key>(high[0]);
    for (int64_t i = 0; i < n; ++i) {
      const Key key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
      most = larger_key(most, key);
      if (!kSymmetric) least = lesser_key(least, key);
    }
    high[0] = most;
    if (!kSymmetric) low[0] = least;
  } else if (step == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const Kept key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
      high[i] = larger_key(high[i], key);
      if (!kSymmetric) low[i] = lesser_key(low[i], key);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Kept key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
      high[i * step] = larger_key(high[i * step], key);
      if (!kSymmetric) low[i * step] = lesser_key(low[i * step], key);
    }
  }
}

// Before the first element: the least high key and the greatest low key of X.
using ClearRun = void (*)(void* low, void* high, int64_t step, int64_t n);

template <class X, class P>
void clear_run(void* low_, void* high_, int64_t step, int64_t n) {
  using Key = typename Traits<X>::Bits;
  using Kept = typename Traits<P>::Bits;
  for (int64_t i = 0; i < n; ++i) {
    static_cast<Kept*>(low_)[i * step] = kMagnitude<X>;
    static_cast<Kept*>(high_)[i * step] = static_cast<Key>(-kMagnitude<X> - 1);
  }
}

// What a reduction left in the memory of a parameter.
template <class Key, class P>
Key key_at(const P* p) {
  typename Traits<P>::Bits key;
  memcpy(&key, p, sizeof(key));
  return static_cast<Key>(key);
}

using FinishRun = void (*)(void* zero_point, void* scale, int64_t step, int64_t n, const Scheme&);

template <class X, class P>
void finish_run(void* zero_point_, void* scale_, int64_t step, int64_t n, const Scheme& scheme) {
  using Key = typename Traits<X>::Bits;
  P* scale = static_cast<P*>(scale_);
  P* zero_point = static_cast<P*>(zero_point_);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = k * step;
    const Key high = key_at<Key>(scale + i);
    if (scheme.symmetric) {
      const Wide<P> max_abs = static_cast<Wide<P>>(widen(bit_cast<X>(high)));
      scale[i] = narrow<P>(symmetric_scale<P>(max_abs, scheme));
      zero_point[i] = narrow<P>(0);
    } else {
      const Key low = key_at<Key>(zero_point + i);
      Wide<P> x_min = static_cast<Wide<P>>(widen(from_order_key<X>(low)));
      const Wide<P> x_max = static_cast<Wide<P>>(widen(from_order_key<X>(high)));
      const Wide<P> s = asymmetric_scale<P>(x_min, x_max, scheme);
      scale[i] = narrow<P>(s);
      zero_point[i] = narrow<P>(asymmetric_zero_point<P>(x_min, s, scheme));
    }
  }
}

// ---- choosing a loop ------------------------------------------------------------------------------

template <class T>
struct Tag {
  using type = T;
};

// Calls f with the tag of a floating type.
template <class F>
auto with_float(Type type, F f) {
  switch (type) {
    case Type::f16: return f(Tag<f16>());
    case Type::bf16: return f(Tag<bf16>());
    case Type::f64: return f(Tag<double>());
    default: return f(Tag<float>());
  }
}

// The steps' types that occur: D1 is x's or wider, D2 is D1 or wider.
template <class X, class Out, bool kEach>
QuantizeRun quantize_loop(Type d1, Type d2) {
  if constexpr (sizeof(X) == 2) {
    if (d1 != Type::f32 && d1 != Type::f64)
      return d2 == Type::f32   ? quantize_run<X, X, float, Out, kEach>
             : d2 == Type::f64 ? quantize_run<X, X, double, Out, kEach>
                               : quantize_run<X, X, X, Out, kEach>;
  }
  if constexpr (sizeof(X) <= 4) {
    if (d1 != Type::f64)
      return d2 == Type::f64 ? quantize_run<X, float, double, Out, kEach>
                             : quantize_run<X, float, float, Out, kEach>;
  }
  return quantize_run<X, double, double, Out, kEach>;
}

template <class Out>
QuantizeRun quantize_loop(const Elementwise& e, bool each) {
  return with_float(e.x_type, [&](auto x) -> QuantizeRun {
    using X = typename decltype(x)::type;
    return each ? quantize_loop<X, Out, true>(e.divide_type, e.add_type)
                : quantize_loop<X, Out, false>(e.divide_type, e.add_type);
  });
}

template <class Q, bool kEach>
DequantizeRun dequantize_loop(Type e1, Type e2) {
  return e1 == Type::f64   ? dequantize_run<Q, double, double, kEach>
         : e2 == Type::f64 ? dequantize_run<Q, float, double, kEach>
                           : dequantize_run<Q, float, float, kEach>;
}

template <bool kEach>
DequantizeRun dequantize_loop(Type q, Type e1, Type e2) {
  switch (q) {
    case Type::i8: return dequantize_loop<int8_t, kEach>(e1, e2);
    case Type::u8: return dequantize_loop<uint8_t, kEach>(e1, e2);
    case Type::i16: return dequantize_loop<int16_t, kEach>(e1, e2);
    default: return dequantize_loop<float, kEach>(e1, e2);
  }
}

DequantizeRun dequantize_loop(const Elementwise& e, Type q, bool each) {
  return each ? dequantize_loop<true>(q, e.subtract_type, e.scale_type)
              : dequantize_loop<false>(q, e.subtract_type, e.scale_type);
}

template <class To>
ConvertRun convert_loop(Type from) {
  switch (from) {
    case Type::i8: return convert_run<int8_t, To>;
    case Type::u8: return convert_run<uint8_t, To>;
    case Type::i16: return convert_run<int16_t, To>;
    case Type::u16: return convert_run<uint16_t, To>;
    case Type::i32: return convert_run<int32_t, To>;
    case Type::u32: return convert_run<uint32_t, To>;
    case Type::i64: return convert_run<int64_t, To>;
    case Type::u64: return convert_run<uint64_t, To>;
    case Type::boolean: return convert_run<boolean, To>;
    default:
      return with_float(from, [](auto x) -> ConvertRun {
        return convert_run<typename decltype(x)::type, To>;
      });
  }
}

ConvertRun convert_loop(Type from, Type to) {
  return with_float(to, [&](auto y) { return convert_loop<typename decltype(y)::type>(from); });
}

// Calls f with the tags of x's type and of the parameters': the same, or float for half precision.
template <class F>
auto with_dynamic_types(const Dynamic& d, F f) {
  return with_float(d.elements.x_type, [&](auto x) {
    if constexpr (sizeof(typename decltype(x)::type) == 2)
      if (d.p_type == Type::f32) return f(x, Tag<float>());
    return f(x, x);
  });
}

}  // namespace
}  // namespace quantkit
