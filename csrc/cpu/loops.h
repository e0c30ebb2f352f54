// The innermost loops, written once as plain C++ that the compiler vectorises for the including file's
// instruction set: typed, branch-free, each over one contiguous run. Internal linkage, as all of this.
//
// What keeps a loop vectorised: __restrict, ternaries, integer keys for extrema, no libm.
#pragma once

#include "../kernels.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

constexpr int64_t kChunk = 1024;  // elements of a scratch buffer; a few of them fit in L1

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- innermost loops ------------------------------------------------------------------------------

// Contiguous elements: rows of n, each under its own parameters (or each element, in mode kEach).
struct Run {
  const void* x;
  const void* q_in;
  void* q;
  void* y;
  const void *divide, *add, *subtract, *multiply;  // parameters, in the type of their step
  Reciprocal reciprocal;
  int64_t rows, n;
  int32_t q_min, q_max;
};
using Loop = void (*)(const Run&);

// What a loop knows of its parameters. From kFma on it multiplies by run.reciprocal, and zero_point is an
// integer: 0 in kZero, kCentred and kCorrected. From kFinite on they were chosen from x, which has no NaN
// where the scale has a reciprocal; then float codes with zero_point 0 are within the limits. kCorrected needs
// no proof of its reciprocals, and makes its own.
enum Mode : int { kShared, kEach, kFma, kZero, kFinite, kCentred, kCorrected, kModes };

struct NoCode {};

// x to q, and from the same registers to y: what dequantizing q gives. bool for Q: whether in range. A
// function of its own: only restrict parameters tell the compiler that nothing overlaps.
template <class X, class D1, class D2, class Q, class Y, int kMode>
void quantize_row(const X* __restrict x, Q* __restrict q, Y* __restrict y,
                  const Wide<D1>* __restrict divide, const Wide<D2>* __restrict add,
                  const float* __restrict subtract, const float* __restrict multiply,
                  const Reciprocal reciprocal, int32_t least, int32_t most, int64_t n) {
  constexpr bool kBack = !kSame<Y, NoCode>, kOwn = kMode == kEach;
  constexpr Wide<D2> shifter = Shifter<Wide<D2>>::value;
  const Wide<D2> q_min = Wide<D2>(least), q_max = Wide<D2>(most);
  const Wide<D1> divide0 = *divide;
  const Wide<D2> add0 = *add;
  const float subtract0 = kBack ? *subtract : 0, multiply0 = kBack ? *multiply : 0;
  constexpr bool kCentre = kMode == kCentred || kMode == kCorrected, kNoZero = kCentre || kMode == kZero;
  for (int64_t i = 0; i < n; ++i) {
    const Wide<D1> from = Wide<D1>(widen(x[i]));
    Wide<D2> v;
    if constexpr (kMode == kCorrected)
      v = rounded_for_code<D1>(corrected_quotient(from, divide0, reciprocal));
    else if constexpr (kMode == kZero || kMode == kCentred)
      v = rounded_for_code<D1>(quotient(from, reciprocal));
    else if constexpr (kMode >= kFma)
      v = affine_for_code<D1, D2>(quotient(from, reciprocal), add0);
    else
      v = affine<D1, D2>(from / (kOwn ? divide[i] : divide0), kOwn ? add[i] : add0);
    const bool nan = kMode >= kFinite ? false : kMode >= kFma ? from != from : v != v;
    if constexpr (kSame<Q, bool>) {
      q[i] = in_range(v, q_min, q_max) & !nan;
    } else {
      const Wide<D2> code = kCentre && kSame<D1, float> ? v + shifter
                                                          : shifted_code(v, q_min, q_max);
      if constexpr (!kSame<Q, NoCode>)
        q[i] = nan ? Q(0) : static_cast<Q>(bit_cast<typename Traits<Wide<D2>>::Bits>(code));
      if constexpr (kBack)
        y[i] = narrow<Y>(dequantized<float, float>(nan ? 0.0f : float(code - shifter),
                                                   kNoZero ? 0.0f : kOwn ? subtract[i] : subtract0,
                                                   kOwn ? multiply[i] : multiply0));
    }
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class X, class D1, class D2, class Q, class Y, int kMode>
void quantize_run(const Run& run) {
  const int64_t n = run.n;
  constexpr bool kCode = !kSame<Q, NoCode>, kBack = !kSame<Y, NoCode>;
  for (int64_t row = 0; row < run.rows; ++row) {
    const auto quantize = [&](auto mode, Reciprocal reciprocal) {
      quantize_row<X, D1, D2, Q, Y, mode.value>(
          static_cast<const X*>(run.x) + row * n, kCode ? static_cast<Q*>(run.q) + row * n : nullptr,
          kBack ? static_cast<Y*>(run.y) + row * n : nullptr,
          static_cast<const Wide<D1>*>(run.divide) + row, static_cast<const Wide<D2>*>(run.add) + row,
          kBack ? static_cast<const float*>(run.subtract) + row : nullptr,
          kBack ? static_cast<const float*>(run.multiply) + row : nullptr, reciprocal, run.q_min,
          run.q_max, n);
    };
    if constexpr (kMode == kCorrected) {
      const float scale = static_cast<const float*>(run.divide)[row];
      if (has_reciprocal(scale))
        quantize(Constant<kCorrected>(), nearest_reciprocal(scale));
      else
        quantize(Constant<kShared>(), run.reciprocal);
    } else {
      quantize(Constant<kMode>(), run.reciprocal);
    }
  }
}

template <class Q, class E1, class E2, bool kOwn>
void dequantize_run(const Run& run) {
  const Q* __restrict q = static_cast<const Q*>(run.q_in);
  E2* __restrict y = static_cast<E2*>(run.y);
  const E2* __restrict scale = static_cast<const E2*>(run.multiply);
  const E1* __restrict zero_point = static_cast<const E1*>(run.subtract);
  const int64_t n = run.n;
  for (int64_t row = 0; row < run.rows; ++row, q += n, y += n) {
    const E2 scale0 = scale[row];
    const E1 zero_point0 = zero_point[row];
    for (int64_t i = 0; i < n; ++i)
      y[i] = dequantized<E1, E2>(static_cast<float>(q[i]), kOwn ? zero_point[i] : zero_point0,
                                 kOwn ? scale[i] : scale0);
  }
}

using ConvertRun = void (*)(const void* from, void* to, int64_t n);

// float64 reaches half precision through float32.
template <class From, class To>
void convert_run(const void* from_, void* to_, int64_t n) {
  const From* __restrict from = static_cast<const From*>(from_);
  To* __restrict to = static_cast<To*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(static_cast<Wide<To>>(widen(from[i])));
}

#ifdef __F16C__
// Instructions for what integer arithmetic does elsewhere, which compilers do not find by themselves.
template <>
void convert_run<f16, float>(const void* from_, void* to_, int64_t n) {
  const f16* from = static_cast<const f16*>(from_);
  float* to = static_cast<float*>(to_);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}
template <>
void convert_run<float, f16>(const void* from_, void* to_, int64_t n) {
  const float* from = static_cast<const float*>(from_);
  f16* to = static_cast<f16*>(to_);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < n; ++i) to[i] = narrow<f16>(from[i]);
}
#endif

// to = keep ? from : 0, for any type of the size of Bits.
template <class Bits>
void select_run(const bool* __restrict keep, const void* from_, void* to_, int64_t n) {
  const Bits* __restrict from = static_cast<const Bits*>(from_);
  Bits* __restrict to = static_cast<Bits*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = keep[i] ? from[i] : Bits(0);
}

// Keys of x joined into low and high: of rows of n elements each into a pair (inner 0, outer from row
// to row), or of one row into a pair for each element.
struct ReduceRun {
  const void* x;
  void *low, *high;
  int64_t outer, inner, rows, n;
};
using ReduceLoop = void (*)(const ReduceRun&);

template <class K>
K larger_key(K a, K b) { return a > b ? a : b; }
template <class K>
K lesser_key(K a, K b) { return a < b ? a : b; }

template <class X, class P, bool kSymmetric>
void reduce_run(const ReduceRun& run) {
  using Key = typename Traits<X>::Bits;
  using Kept = typename Traits<P>::Bits;
  const X* __restrict x = static_cast<const X*>(run.x);
  Kept* __restrict low = static_cast<Kept*>(run.low);
  Kept* __restrict high = static_cast<Kept*>(run.high);
  const int64_t n = run.n, step = run.inner;
  if (step == 0) {
    for (int64_t row = 0; row < run.rows; ++row, x += n, low += run.outer, high += run.outer) {
      Key least = static_cast<Key>(*low), most = static_cast<Key>(*high);
      for (int64_t i = 0; i < n; ++i) {
        const Key key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
        most = larger_key(most, key);
        if (!kSymmetric) least = lesser_key(least, key);
      }
      *high = most;
      if (!kSymmetric) *low = least;
    }
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

using FinishLoop = void (*)(void* zero_point, void* scale, int64_t step, int64_t n, const Scheme&);

template <class X, class P, bool kSymmetric, bool kDense>
void finish_run(void* zero_point_, void* scale_, int64_t step, int64_t n, const Scheme& given) {
  using Key = typename Traits<X>::Bits;
  const Scheme scheme = given;
  P* scale = static_cast<P*>(scale_);
  P* zero_point = static_cast<P*>(zero_point_);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = kDense ? k : k * step;
    const Key low = kSymmetric ? Key(0) : key_at<Key>(zero_point + i);
    parameters_of<X, P, kSymmetric>(low, key_at<Key>(scale + i), scheme, scale[i], zero_point[i]);
  }
}

// ---- choosing a loop ------------------------------------------------------------------------------

// A loop for each mode; those that cannot be are null.
struct Loops {
  Loop of[kModes] = {};
};

template <class X, class D1, class D2, class Q, class Y>
Loops loops_of() {
  Loops loops;
  loops.of[kShared] = quantize_run<X, D1, D2, Q, Y, kShared>;
  loops.of[kEach] = quantize_run<X, D1, D2, Q, Y, kEach>;
  if constexpr (kHasFma && sizeof(Wide<D1>) == 4) {
    loops.of[kFma] = quantize_run<X, D1, D2, Q, Y, kFma>;
    loops.of[kZero] = quantize_run<X, D1, D2, Q, Y, kZero>;
    // Parameters chosen from x share its type, or are float.
    if constexpr (kSame<D1, D2> && !kSame<Q, bool> && !kSame<Q, NoCode>) {
      loops.of[kFinite] = quantize_run<X, D1, D2, Q, Y, kFinite>;
      loops.of[kCentred] = quantize_run<X, D1, D2, Q, Y, kCentred>;
      // Half precision has its rounding to compute: there, two more steps cost more than the proof.
      if constexpr (kSame<D1, float>)
        loops.of[kCorrected] = quantize_run<X, D1, D2, Q, Y, kCorrected>;
    }
  }
  return loops;
}

// What a loop reads where x is of type T: float16 comes as float, widened a chunk at a time.
template <class T>
struct Loaded {
  using type = T;
};
template <>
struct Loaded<f16> {
  using type = float;
};
bool is_widened(const Elementwise& e) { return e.x_type == Type::f16; }

// The steps' types that occur, where x is of type T: D1 is T or wider, D2 is D1 or wider.
template <class T, class Q, class Y>
Loops loops_of(Type d1, Type d2) {
  using X = typename Loaded<T>::type;
  if constexpr (sizeof(T) == 2) {
    if (d1 != Type::f32 && d1 != Type::f64)
      return d2 == Type::f32   ? loops_of<X, T, float, Q, Y>()
             : d2 == Type::f64 ? loops_of<X, T, double, Q, Y>()
                               : loops_of<X, T, T, Q, Y>();
  }
  if constexpr (sizeof(T) <= 4) {
    if (d1 != Type::f64)
      return d2 == Type::f64 ? loops_of<X, float, double, Q, Y>()
                             : loops_of<X, float, float, Q, Y>();
  }
  return loops_of<X, double, double, Q, Y>();
}

template <class Q>
Loops quantize_loops(const Elementwise& e) {
  return with_float(e.x_type, [&](auto x) {
    return loops_of<typename decltype(x)::type, Q, NoCode>(e.divide_type, e.add_type);
  });
}

Loops quantize_loops(const Elementwise& e, Type code) {
  return code == Type::i16 ? quantize_loops<int16_t>(e) : quantize_loops<int8_t>(e);
}

// Whether one loop serves both directions: all steps in float, or rounded from it.
bool is_fused(const Elementwise& e) {
  return e.x_type != Type::f64 && e.divide_type != Type::f64 && e.add_type != Type::f64 &&
         e.subtract_type == Type::f32 && e.scale_type == Type::f32;
}

// Where is_fused: all types of steps but double.
template <class T, class Q, class Y>
Loops fused_loops_of(Type d1, Type d2) {
  using X = typename Loaded<T>::type;
  if constexpr (sizeof(T) == 2) {
    if (d1 != Type::f32)
      return d2 == Type::f32 ? loops_of<X, T, float, Q, Y>() : loops_of<X, T, T, Q, Y>();
  }
  return loops_of<X, float, float, Q, Y>();
}

template <class T>
Loops quantize_dequantize_loops(const Elementwise& e) {
  return e.q_type == Type::i16 ? fused_loops_of<T, int16_t, float>(e.divide_type, e.add_type)
                               : fused_loops_of<T, int8_t, float>(e.divide_type, e.add_type);
}

Loops quantize_dequantize_loops(const Elementwise& e) {
  switch (e.x_type) {
    case Type::f16: return quantize_dequantize_loops<f16>(e);
    case Type::bf16: return quantize_dequantize_loops<bf16>(e);
    default: return quantize_dequantize_loops<float>(e);
  }
}

// y in x's type, but for float16: in float, to be narrowed a chunk at a time.
Loops fake_quantize_loops(const Elementwise& e) {
  switch (e.x_type) {
    case Type::f16: return fused_loops_of<f16, NoCode, float>(e.divide_type, e.add_type);
    case Type::bf16: return fused_loops_of<bf16, NoCode, bf16>(e.divide_type, e.add_type);
    default: return fused_loops_of<float, NoCode, float>(e.divide_type, e.add_type);
  }
}

template <class Q, bool kOwn>
Loop dequantize_loop(Type e1, Type e2) {
  return e1 == Type::f64   ? dequantize_run<Q, double, double, kOwn>
         : e2 == Type::f64 ? dequantize_run<Q, float, double, kOwn>
                           : dequantize_run<Q, float, float, kOwn>;
}

template <bool kOwn>
Loop dequantize_loop(Type q, Type e1, Type e2) {
  switch (q) {
    case Type::i8: return dequantize_loop<int8_t, kOwn>(e1, e2);
    case Type::u8: return dequantize_loop<uint8_t, kOwn>(e1, e2);
    case Type::i16: return dequantize_loop<int16_t, kOwn>(e1, e2);
    default: return dequantize_loop<float, kOwn>(e1, e2);
  }
}

Loop dequantize_loop(const Elementwise& e, Type q, bool each) {
  return each ? dequantize_loop<true>(q, e.subtract_type, e.scale_type)
              : dequantize_loop<false>(q, e.subtract_type, e.scale_type);
}

ConvertRun convert_loop(Type from, Type to) {
  return with_float(to, [&](auto y) {
    return with_real(from, [&](auto x) -> ConvertRun {
      return convert_run<typename decltype(x)::type, typename decltype(y)::type>;
    });
  });
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
