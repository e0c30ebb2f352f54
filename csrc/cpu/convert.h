// From type to type, a choice between elements and zero, and codes of which several share a byte:
// loops over contiguous elements.
#pragma once

#include "../calls.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

constexpr int64_t kChunk = 1024;  // elements of a buffer; a few of them fit in L1

// Elements of any type, moved as integers of their size.
template <class Bits>
using Any [[gnu::may_alias]] = Bits;

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

}  // namespace
}  // namespace quantkit
