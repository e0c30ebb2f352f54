// The innermost loops, written once as plain C++ that the compiler vectorises for the including
// file's instruction set: typed, branch-free, each over contiguous elements. Internal linkage, as
// all of this.
//
// What keeps a loop vectorised: __restrict, ternaries, integer keys for extremes, no libm, limits
// that are known at run time only.
#pragma once

#include "../calls.h"
#include "../numerics/division.h"
#include "../numerics/reductions.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

constexpr int64_t kChunk = 1024;  // elements of a buffer; a few of them fit in L1


// Elements of any type, moved as integers of their size.
template <class Bits>
using Any [[gnu::may_alias]] = Bits;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- quantize, and back from the same registers -------------------------------------------------

// How a loop gets from x to a code: by dividing by one scale or by one for each element, or by a
// reciprocal with a proof. Less is to do where zero_point is 0; where parameters were chosen from
// x, which has no NaN if its scale has a reciprocal; and where they are centred, so that float
// codes are within the limits too, and a corrected product needs no proof (with one, long rows are
// faster). By a power of two a product is the quotient. Each of these is worth its loop
// (docs/performance.md).
enum Mode : int {
  kDivide,
  kEach,
  kProduct,
  kReciprocal,
  kNoZeroPoint,
  kChosen,
  kCentred,
  kProved,
  kModes
};
constexpr int64_t kProofPays = 4096;  // elements of a centred row

// Rows of n contiguous elements, each under its own parameters (or each element, in mode kEach): x
// as float, whatever its type, and y too.
struct Rows {
  const void* x;
  const void* q_in;
  void* q;
  void* y;
  const void *divide, *add, *subtract,
      *multiply;  // parameters: floats, where steps are mixed doubles
  Reciprocal reciprocal;
  const uint16_t* draws;  // of the elements, where codes are rounded randomly
  int64_t rows, n;
  int32_t q_min, q_max;
};
using Loop = void (*)(const Rows&);

// Instead of a code's type: no result of that kind; whether codes are within the limits; whether
// they are not, NaN aside.
struct None {};
struct Mask {};
struct Outside {};
template <class Q>
struct StoredAs : Tag<Q> {};
template <>
struct StoredAs<Mask> : Tag<uint8_t> {};
template <>
struct StoredAs<Outside> : Tag<uint8_t> {};

// Instead of an encoder: one that rounds randomly.
template <class E>
struct Randomly {
  static constexpr bool kInteger = E::kInteger;

  QK_INLINE static Encoded<float> encode(float v, float low, float high, float from, float u) {
    return E::encode_randomly(v, low, high, from, u);
  }
  QK_INLINE static int32_t inside(float v, float low, float high) { return between(v, low, high); }
};
template <class E>
constexpr bool kIsRandom = false;
template <class E>
constexpr bool kIsRandom<Randomly<E>> = true;

// 1 / scale for a centred loop: what a product with x of half precision needs, or a corrected one.
template <class D>
Reciprocal reciprocal_of(float scale) {
  if constexpr (kSame<D, float>) return nearest_reciprocal(scale);
  return {1.0f / scale, 0};
}

// A function of its own: only restrict parameters tell the compiler that nothing overlaps. D: the
// dtype of the quotient, E: the encoder, Q: the integer that holds a code, None or Mask.
template <class D, class E, class Q, bool kBack, int kMode>
void quantize_row(const float* __restrict x, typename StoredAs<Q>::type* __restrict q,
                  float* __restrict y, const float* __restrict divide, const float* __restrict add,
                  const float* __restrict subtract, const float* __restrict multiply,
                  const Reciprocal reciprocal, const uint16_t* __restrict draws, int32_t least,
                  int32_t most, int64_t n) {
  constexpr bool kOwn = kMode == kEach, kFinite = kMode >= kChosen, kCentre = kMode >= kCentred;
  constexpr bool kZero = kMode == kNoZeroPoint || kCentre || !E::kInteger;
  constexpr bool kFloat = kSame<D, float>;
  using S = typename SumOf<D>::type;
  const float low = float(least), high = float(most);
  const float divide0 = *divide, add0 = kZero ? 0 : *add;
  const float subtract0 = kBack && !kZero ? *subtract : 0, multiply0 = kBack ? *multiply : 0;
  for (int64_t i = 0; i < n; ++i) {
    float v;
    if constexpr (kMode == kCentred)
      v = rounded_for_code<D>(kFloat ? corrected_quotient(x[i], divide0, reciprocal)
                                     : x[i] * reciprocal.high);
    else if constexpr (kMode == kProduct)
      v = x[i] * reciprocal.high;
    else if constexpr (kZero && kMode >= kReciprocal)
      v = rounded_for_code<D>(quotient(x[i], reciprocal));
    else if constexpr (kZero)
      v = x[i] / (kOwn ? divide[i] : divide0);
    else if constexpr (kMode >= kReciprocal)
      v = affine_for_code<D, S>(quotient(x[i], reciprocal), add0);
    else
      v = affine<D, S>(x[i] / (kOwn ? divide[i] : divide0), kOwn ? add[i] : add0);
    // NaN where x / scale is; of its sign, as the scale of a reciprocal is above 0.
    const float judged = kMode >= kReciprocal ? x[i] : v;
    Encoded<float> made;
    if constexpr (kIsRandom<E>)
      made = E::encode(v, low, high, judged, uniform(draws[i]));
    else if constexpr (!kFinite)
      made = E::encode(v, low, high, judged);
    else if constexpr (kCentre && kFloat)
      made = E::within(v, judged);
    else  // a scale rounded to half precision may leave the greatest code a step above the limit
      made = E::encode_finite(v, low, high, judged);
    if constexpr (kSame<Q, Mask> || kSame<Q, Outside>)
      q[i] = ((kSame<D, whole> ? between(v, low, high) : E::inside(v, low, high)) ^
              (kSame<Q, Mask> ? 0 : -1)) &
             (judged == judged ? 1 : 0);
    else if constexpr (!kSame<Q, None>)
      q[i] = static_cast<Q>(made.code);
    if constexpr (kBack)
      y[i] = dequantized<float, float>(made.number,
                                       kZero  ? 0.0f
                                       : kOwn ? subtract[i]
                                              : subtract0,
                                       kOwn ? multiply[i] : multiply0);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class D, class E, class Q, bool kBack, int kMode>
void quantize_rows(const Rows& r) {
  for (int64_t row = 0; row < r.rows; ++row) {
    const auto own = [&](const void* parameter) {
      return static_cast<const float*>(parameter) + row;
    };
    const auto quantize = [&](auto mode, Reciprocal reciprocal) {
      using Stored = typename StoredAs<Q>::type;
      quantize_row<D, E, Q, kBack, mode.value>(
          static_cast<const float*>(r.x) + row * r.n,
          kSame<Q, None> ? nullptr : static_cast<Stored*>(r.q) + row * r.n,
          kBack ? static_cast<float*>(r.y) + row * r.n : nullptr, own(r.divide), own(r.add),
          kBack ? own(r.subtract) : nullptr, kBack ? own(r.multiply) : nullptr, reciprocal,
          kIsRandom<E> ? r.draws + row * r.n : nullptr, r.q_min, r.q_max, r.n);
    };
    if constexpr (kMode == kCentred) {
      const float scale = *own(r.divide);
      if constexpr (kSame<D, float>) {
        Reciprocal proved;
        if (r.n >= kProofPays && exact_reciprocal(scale, proved)) {
          quantize(Constant<kProved>(), proved);
          continue;
        }
      }
      if (has_reciprocal(scale))
        quantize(Constant<kCentred>(), reciprocal_of<D>(scale));
      else
        quantize(Constant<kDivide>(), r.reciprocal);
    } else if constexpr (kMode == kProduct) {
      quantize(Constant<kMode>(), Reciprocal{1.0f / *own(r.divide), 0});
    } else {
      quantize(Constant<kMode>(), r.reciprocal);
    }
  }
}

// The loops of each mode; those that cannot be are null.
struct Loops {
  Loop of[kModes] = {};
};

template <class D, class E, class Q, bool kBack>
Loops loops_of() {
  Loops loops;
  loops.of[kDivide] = quantize_rows<D, E, Q, kBack, kDivide>;
  loops.of[kEach] = quantize_rows<D, E, Q, kBack, kEach>;
  if constexpr (!E::kInteger) loops.of[kProduct] = quantize_rows<D, E, Q, kBack, kProduct>;
  if constexpr (kHasFma && !kIsRandom<E>) {
    constexpr bool kCodes = !kSame<Q, Mask> && !kSame<Q, Outside> && !kSame<Q, None>,
                   kWhole = kSame<D, whole>;
    if constexpr (E::kInteger) loops.of[kReciprocal] = quantize_rows<D, E, Q, kBack, kReciprocal>;
    if constexpr (!kWhole) loops.of[kNoZeroPoint] = quantize_rows<D, E, Q, kBack, kNoZeroPoint>;
    if constexpr (kCodes && E::kInteger && !kWhole)
      loops.of[kChosen] = quantize_rows<D, E, Q, kBack, kChosen>;
    if constexpr (kCodes && !kWhole) loops.of[kCentred] = quantize_rows<D, E, Q, kBack, kCentred>;
  }
  return loops;
}

// kN: how many elements, where the compiler is to know it.
template <class F, bool kOwn, int64_t kN = 0>
void dequantize_row(const typename F::Storage* __restrict q, float* __restrict y,
                    const float* __restrict scale, const float* __restrict zero_point, int64_t n) {
  if constexpr (kN != 0) n = kN;
  const float scale0 = *scale, zero_point0 = *zero_point;
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (!F::kInteger) {
    // As float16 with a power of two, which the machine widens. The power goes into the scale where
    // that stays finite.
    const __m256 power = _mm256_set1_ps(F::kPower);
    const __m256 product = _mm256_set1_ps(scale0 * F::kPower);
    const bool exact = kOwn || !(scale0 >= F::kScales || scale0 <= -F::kScales);
    for (; exact && i + 8 <= n; i += 8) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i));
      const __m256 number = _mm256_cvtph_ps(F::as_f16(_mm_cvtepu8_epi16(bytes)));
      const __m256 s = kOwn ? _mm256_loadu_ps(scale + i) : product;
      _mm256_storeu_ps(y + i, _mm256_mul_ps(kOwn ? _mm256_mul_ps(number, power) : number, s));
    }
  }
#endif
  for (; i < n; ++i)
    y[i] = dequantized<float, float>(F::number(q[i]), kOwn ? zero_point[i] : zero_point0,
                                     kOwn ? scale[i] : scale0);
}

template <class F, bool kOwn>
void dequantize_rows(const Rows& r) {
  const auto of_length = [&](auto length) {
    for (int64_t row = 0; row < r.rows; ++row)
      dequantize_row<F, kOwn, length.value>(
          static_cast<const typename F::Storage*>(r.q_in) + row * r.n,
          static_cast<float*>(r.y) + row * r.n, static_cast<const float*>(r.multiply) + row,
          static_cast<const float*>(r.subtract) + row, r.n);
  };
  if (!F::kInteger && r.n == 16) return of_length(Constant<16>());
  if (!F::kInteger && r.n == 32) return of_length(Constant<32>());
  of_length(Constant<0>());
}

// ---- steps of any dtypes: in double, a step at a time -------------------------------------------

void quantize_mixed(const Steps& steps, const double* __restrict x, double* __restrict v,
                    const double* __restrict scale, const double* __restrict zero_point,
                    int64_t n) {
  with_float(steps.divide, [&](auto tag) {
    using D = typename decltype(tag)::type;
    for (int64_t i = 0; i < n; ++i) v[i] = quotient_in<D>(x[i], scale[i]);
  });
  with_float(steps.add, [&](auto tag) {
    using D = typename decltype(tag)::type;
    for (int64_t i = 0; i < n; ++i) v[i] = sum_in<D>(v[i], zero_point[i]);
  });
}

// From there to codes and what they stand for, or to a mask.
template <class Q>
void encode_mixed(const double* __restrict v, void* q_, double* __restrict number, const Rows& r,
                  int64_t n) {
  typename StoredAs<Q>::type* __restrict q = static_cast<typename StoredAs<Q>::type*>(q_);
  const double low = r.q_min, high = r.q_max;
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kSame<Q, Mask>) {
      q[i] = IntegerEncoder::inside(v[i], low, high) & 1;
    } else {
      const Encoded<double> made = IntegerEncoder::encode(v[i], low, high, v[i]);
      if constexpr (!kSame<Q, None>) q[i] = static_cast<Q>(made.code);
      number[i] = made.number;
    }
  }
}

void dequantize_mixed(const Steps& steps, double* __restrict number, const Rows& r, int64_t n) {
  const double* __restrict scale = static_cast<const double*>(r.multiply);
  const double* __restrict zero_point = static_cast<const double*>(r.subtract);
  for (int64_t i = 0; i < n; ++i)
    number[i] = dequantized_in(steps, float(number[i]), zero_point[i], scale[i]);
}

// ---- from type to type --------------------------------------------------------------------------

using Convert = void (*)(const void* from, void* to, int64_t n);

// float64 reaches half precision through float32.
template <class From, class To>
void convert_row(const void* from_, void* to_, int64_t n) {
  const From* __restrict from = static_cast<const From*>(from_);
  To* __restrict to = static_cast<To*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(static_cast<Wide<To>>(widen(from[i])));
}

#ifdef __F16C__
// Instructions for what integer arithmetic does elsewhere, which compilers do not find by
// themselves.
template <>
void convert_row<f16, float>(const void* from_, void* to_, int64_t n) {
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
void convert_row<float, f16>(const void* from_, void* to_, int64_t n) {
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

// To float or double from any type, to half precision from these.
Convert convert_of(Type from, Type to) {
  if (to == Type::f64)
    return with_real(
        from, [](auto x) -> Convert { return convert_row<typename decltype(x)::type, double>; });
  if (to == Type::f32)
    return with_real(
        from, [](auto x) -> Convert { return convert_row<typename decltype(x)::type, float>; });
  if (to == Type::bf16)
    return from == Type::f64 ? convert_row<double, bf16> : convert_row<float, bf16>;
  return from == Type::f64 ? convert_row<double, f16> : convert_row<float, f16>;
}

// to = keep ? from : 0, for any type of the size of Bits.
template <class Bits>
void select_row(const uint8_t* __restrict keep, const void* from_, void* to_, int64_t n) {
  const Any<Bits>* __restrict from = static_cast<const Any<Bits>*>(from_);
  Any<Bits>* __restrict to = static_cast<Any<Bits>*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = keep[i] ? from[i] : Bits(0);
}
void select_row(int64_t size, const uint8_t* keep, const void* from, void* to, int64_t n) {
  switch (size) {
    case 2: return select_row<int16_t>(keep, from, to, n);
    case 4: return select_row<int32_t>(keep, from, to, n);
    default: return select_row<int64_t>(keep, from, to, n);
  }
}

// ---- codes of which several share a byte --------------------------------------------------------

// n codes, from bytes of their own and back.
template <class F>
void pack_row(const void* codes_, void* bytes_, int64_t n) {
  const typename F::Storage* __restrict codes = static_cast<const typename F::Storage*>(codes_);
  uint8_t* __restrict bytes = static_cast<uint8_t*>(bytes_);
  for (int64_t i = 0; i < n / F::kPerByte; ++i) bytes[i] = F::packed(codes + i * F::kPerByte);
}
template <class F>
void unpack_row(const void* bytes_, void* codes_, int64_t n) {
  const uint8_t* __restrict bytes = static_cast<const uint8_t*>(bytes_);
  typename F::Storage* __restrict codes = static_cast<typename F::Storage*>(codes_);
  for (int64_t i = 0; i < n / F::kPerByte; ++i)
    for (int k = 0; k < F::kPerByte; ++k) codes[i * F::kPerByte + k] = F::unpacked(bytes[i], k);
}
// Null where a code has an element to itself.
Convert pack_of(Format format) {
  return with_format(format, [](auto tag) -> Convert {
    using F = typename decltype(tag)::type;
    if constexpr (F::kPerByte > 1) return pack_row<F>;
    return nullptr;
  });
}
Convert unpack_of(Format format) {
  return with_format(format, [](auto tag) -> Convert {
    using F = typename decltype(tag)::type;
    if constexpr (F::kPerByte > 1) return unpack_row<F>;
    return nullptr;
  });
}

// ---- reductions ---------------------------------------------------------------------------------

// Contiguous elements: rows of n for a state each, `outer` apart (columns = 0), or n elements, of
// which the first is in column `first` of so many, each column with a state.
struct Reduce {
  const void* x;
  void* keys;
  int64_t state, count;  // the first state, and the length of each array of keys
  int64_t rows, outer, n, columns, first;
};

template <class X, class R>
struct Reduction {
  using Key = typename R::Bits;
  static constexpr bool kTwo = R::kKeys > 1;
  static constexpr int64_t kPeriod = 256;  // of few columns, as many as make about so many

  static void rows(const Reduce& r) {
    const X* __restrict x = static_cast<const X*>(r.x);
    Key* __restrict keys0 = static_cast<Key*>(r.keys) + r.state;
    Key* __restrict keys1 = keys0 + (kTwo ? r.count : 0);
    if (r.columns == 0) {
      for (int64_t row = 0; row < r.rows; ++row, x += r.n, keys0 += r.outer, keys1 += r.outer) {
        Key a = *keys0, b = *keys1;
        for (int64_t i = 0; i < r.n; ++i) {
          a = R::template join<0>(a, R::template take<0>(x[i]));
          if constexpr (kTwo) b = R::template join<1>(b, R::template take<1>(x[i]));
        }
        *keys0 = a;
        if constexpr (kTwo) *keys1 = b;
      }
    } else if (r.first + r.n <= r.columns) {
      over(x, keys0 + r.first, keys1 + r.first, r.n);
    } else {
      periods(x, keys0, keys1, r.columns, r.first, r.n);
    }
  }

  // n columns of kRows rows that lie one after the other.
  template <int kRows = 1>
  static void over(const X* __restrict x, Key* __restrict keys0, Key* __restrict keys1, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      Key a = R::template take<0>(x[i]), b = R::template take<1>(x[i]);
      for (int row = 1; row < kRows; ++row) {
        a = R::template join<0>(a, R::template take<0>(x[i + row * n]));
        if constexpr (kTwo) b = R::template join<1>(b, R::template take<1>(x[i + row * n]));
      }
      keys0[i] = R::template join<0>(keys0[i], a);
      if constexpr (kTwo) keys1[i] = R::template join<1>(keys1[i], b);
    }
  }

  static void periods(const X* x, Key* keys0, Key* keys1, int64_t columns, int64_t first,
                      int64_t n) {
    if (first != 0) {
      const int64_t head = columns - first;
      over(x, keys0 + first, keys1 + first, head);
      x += head, n -= head;
    }
    const int64_t period = columns < kPeriod ? kPeriod / columns * columns : columns;
    if (columns < kPeriod && n >= 4 * period) {
      Key many[R::kKeys][kPeriod];
      Key *const many0 = many[0], *const many1 = many[R::kKeys - 1];
      for (int64_t i = 0; i < period; ++i) {
        many0[i] = R::template first<0>();
        if constexpr (kTwo) many1[i] = R::template first<1>();
      }
      for (; n >= 4 * period; x += 4 * period, n -= 4 * period) over<4>(x, many0, many1, period);
      for (int64_t i = 0; i < period; i += columns)
        for (int64_t c = 0; c < columns; ++c) {
          keys0[c] = R::template join<0>(keys0[c], many0[i + c]);
          if constexpr (kTwo) keys1[c] = R::template join<1>(keys1[c], many1[i + c]);
        }
    }
    for (; n > 0; x += columns, n -= columns) over(x, keys0, keys1, smaller(n, columns));
  }

  static void first(void* keys_, int64_t count) {
    Key* __restrict keys = static_cast<Key*>(keys_);
    for (int64_t i = 0; i < count; ++i) keys[i] = R::template first<0>();
    for (int64_t i = count; kTwo && i < 2 * count; ++i) keys[i] = R::template first<1>();
  }

  static void join(void* to_, const void* from_, int64_t count) {
    Key* __restrict to = static_cast<Key*>(to_);
    const Key* __restrict from = static_cast<const Key*>(from_);
    for (int64_t i = 0; i < count; ++i) to[i] = R::template join<0>(to[i], from[i]);
    for (int64_t i = count; kTwo && i < 2 * count; ++i) to[i] = R::template join<1>(to[i], from[i]);
  }
};

// Parameters `step` elements apart, from n states.
struct Finalize {
  const void* keys;
  int64_t state, count;
  void *scale, *zero_point;
  int64_t scale_step, zero_point_step, n;
  void* stored;         // beside scale, with its step
  const float* global;  // as well, where there is one for each scale; else one
  bool each_global;
};

// Of n symmetric scales that are stored as others than the steps use, `step` apart; used: null where
// no step is taken; global: one where its step is 0.
template <class How, int64_t kStep>
void store_scales(const float* __restrict max_abs, Any<typename How::Bits>* __restrict stored,
                  float* __restrict used, const float* __restrict global, bool each_global,
                  int64_t step, int64_t n, const Scheme& given) {
  const Scheme scheme = given;
  if constexpr (kStep != 0) step = kStep;
  const float global0 = *global;
  const auto store = [&](int64_t i, float divisor) {
    const StoredScale made = How::of(max_abs[i], divisor, scheme);
    stored[i * step] = static_cast<typename How::Bits>(made.bits);
    return made.used;
  };
  if (each_global)
    for (int64_t i = 0; i < n; ++i) {
      const float scale = store(i, global[i * step]);
      if (used != nullptr) used[i * step] = scale;
    }
  else if (used == nullptr)
    for (int64_t i = 0; i < n; ++i) store(i, global0);
  else
    for (int64_t i = 0; i < n; ++i) used[i * step] = store(i, global0);
}
template <class X>
void finalize_stored_row(const Finalize& f, const Scheme& scheme) {
  using R = AbsMax<X>;
  const typename R::Bits* __restrict keys = static_cast<const typename R::Bits*>(f.keys) + f.state;
  float max_abs[kChunk];
  for (int64_t begin = 0; begin < f.n; begin += kChunk) {
    const int64_t n = smaller(kChunk, f.n - begin), at = begin * f.scale_step;
    for (int64_t i = 0; i < n; ++i) max_abs[i] = R::template extreme<float>(keys + begin + i);
    with_stored(scheme, [&](auto tag) {
      using How = typename decltype(tag)::type;
      const auto store = f.scale_step == 1 ? store_scales<How, 1> : store_scales<How, 0>;
      store(max_abs, static_cast<Any<typename How::Bits>*>(f.stored) + at,
            f.scale == nullptr ? nullptr : static_cast<float*>(f.scale) + at,
            f.global + (f.each_global ? at : 0), f.each_global, f.scale_step, n, scheme);
    });
  }
}

template <class X, class P, class R, bool kDense>
void finalize_row(const Finalize& f, const Scheme& given) {
  using Key = typename R::Bits;
  const Scheme scheme = given;
  const Key* __restrict keys = static_cast<const Key*>(f.keys) + f.state;
  P* __restrict scale = static_cast<P*>(f.scale);
  P* __restrict zero_point = static_cast<P*>(f.zero_point);
  for (int64_t i = 0; i < f.n; ++i) {
    Key own[R::kKeys];
    for (int k = 0; k < R::kKeys; ++k) own[k] = keys[i + k * f.count];
    P chosen_zero_point;
    R::finalize(own, scheme, scale[kDense ? i : i * f.scale_step], chosen_zero_point);
    if (zero_point != nullptr) zero_point[kDense ? i : i * f.zero_point_step] = chosen_zero_point;
  }
}

}  // namespace
}  // namespace quantkit
