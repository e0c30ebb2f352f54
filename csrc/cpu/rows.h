// The innermost loops of codes, written once as plain C++ that the compiler vectorises for the
// including file's instruction set: typed, branch-free, each over contiguous elements.
//
// What keeps a loop vectorised: __restrict, ternaries, no libm, limits that are known at run time
// only.
#pragma once

#include "../calls.h"
#include "../numerics/division.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

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
  // Parameters: floats, where steps are mixed doubles.
  const void *divide, *add, *subtract, *multiply;
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
// dtype of the quotient, E: the encoder, Q: the integer that holds a code, None, Mask or Outside.
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

}  // namespace
}  // namespace quantkit
