// The storage formats of codes. A new one is a struct here and a line in QK_FORMATS.
//
// A format says what a code is: `Storage` holds one, `number` is what it stands for. Its `Encoder`
// makes codes of numbers in the width of the steps, float or double: `encode` gives the code, in
// the low bits of a register, and its number, so that loops that go both ways decode nothing.
#pragma once

#include "floats.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace quantkit {

#define QK_FORMATS(X)                       \
  X(int8, IntegerFormat<int8_t>)            \
  X(uint8, IntegerFormat<uint8_t>)          \
  X(int16, IntegerFormat<int16_t>)          \
  X(uint16, IntegerFormat<uint16_t>)        \
  X(int4, PackedFormat<-8>)                 \
  X(uint4, PackedFormat<0>)                 \
  X(float8_e4m3fn, FloatFormat<3, -6, 448>) \
  X(float8_e5m2, FloatFormat<2, -14, 57344>)

// Beside codes, dequantize takes plain numbers: any real tensor, made float32 first.
#define QK_NAME(name, ...) name,
enum class Format : int32_t { QK_FORMATS(QK_NAME) numbers };
#undef QK_NAME

namespace {

template <int kSize>
struct SignedOf : Tag<int16_t> {};
template <>
struct SignedOf<1> : Tag<int8_t> {};

template <class V>
struct Encoded {
  typename Traits<V>::Bits code;
  V number;
};

// All bits where low <= v <= high, else none, as where v is NaN.
template <class V>
QK_INLINE typename Traits<V>::Bits between(V v, V low, V high) {
  using Bits = typename Traits<V>::Bits;
  return Bits(v >= low ? -1 : 0) & Bits(v <= high ? -1 : 0);
}

// Codes that are integers, of every width: the low bits are two's complement.
struct IntegerEncoder {
  static constexpr bool kInteger = true;

  // clip(round(v), low, high), and 0 where `from` is NaN. The limits are integers, so clipping
  // first is the same. In bits: of a bool g++ makes bytes, and then masks them again.
  template <class V>
  QK_INLINE static Encoded<V> encode(V v, V low, V high, V from) {
    using Bits = typename Traits<V>::Bits;
    const Bits keep = from == from ? -1 : 0;
    return within(bit_cast<V>(Bits(bit_cast<Bits>(clamp(v, low, high)) & keep)), from);
  }
  // Where nothing is NaN.
  template <class V>
  QK_INLINE static Encoded<V> encode_finite(V v, V low, V high, V from) {
    return within(clamp(v, low, high), from);
  }
  // And nothing beyond the limits.
  template <class V>
  QK_INLINE static Encoded<V> within(V v, V) {
    const V shifted = v + kShifter<V>;
    return {bit_cast<typename Traits<V>::Bits>(shifted), shifted - kShifter<V>};
  }

  // All bits where low <= round(v) <= high before clipping, else none. NaN is clipped to low - 1,
  // and so outside.
  template <class V>
  QK_INLINE static typename Traits<V>::Bits inside(V v, V low, V high) {
    return between((clamp(v, low - 1, high + 1) + kShifter<V>)-kShifter<V>, low, high);
  }
};

template <class T>
struct IntegerFormat {
  using Storage = T;
  using Encoder = IntegerEncoder;
  static constexpr bool kInteger = true;
  static constexpr int kPerByte = 1;
  static constexpr int64_t kLow = T(-1) < T(0) ? -(1 << (8 * sizeof(T) - 1)) : 0;
  static constexpr int64_t kHigh = kLow + (1 << (8 * sizeof(T))) - 1;

  QK_INLINE static float number(T stored) { return static_cast<float>(stored); }
};

// Two codes of 4 bits a byte, the first in the lower bits. Loops see them in bytes of their own.
template <int32_t kFrom>
struct PackedFormat {
  using Storage = int8_t;
  using Encoder = IntegerEncoder;
  static constexpr bool kInteger = true;
  static constexpr int kPerByte = 2;
  static constexpr int64_t kLow = kFrom, kHigh = kFrom + 15;

  QK_INLINE static float number(int8_t stored) { return static_cast<float>(stored); }
  QK_INLINE static uint8_t packed(int8_t first, int8_t second) {
    return uint8_t((uint8_t(first) & 15) | (uint8_t(second) << 4));
  }
  QK_INLINE static int8_t unpacked(uint8_t byte, int place) {
    return int8_t(((byte >> 4 * place & 15) ^ (kFrom & 15)) + kFrom);
  }
};

// A sign, an exponent whose smallest normal is kLeast, M bits of mantissa (contract 2, section 5).
template <int M, int kLeast, int kMost>
struct FloatFormat {
  using Storage = uint8_t;
  using Encoder = FloatFormat;
  static constexpr bool kInteger = false;
  static constexpr int kPerByte = 1;
  static constexpr int64_t kLow = -kMost, kHigh = kMost;
  static constexpr int32_t kLeastField = (kLeast + 127) << 23, kSign = INT32_MIN, kNan = 0x7fc00000;
  // The magnitude of the first code that is no finite number.
  static constexpr int32_t kFinite = M == 3 ? 0x7f : 0x7c;

  // v clipped, then rounded; the sign is that of `from`, and so is NaN. With the power of two that
  // leaves M bits, the sum has the rounded mantissa in its last bits. The same number's last bits
  // count the binades: their sum is the code. They are even, so that ties stay.
  QK_INLINE static Encoded<float> encode(float v, float, float high, float from) {
    const Encoded<float> e = encode_finite(v, 0, high, from);
    const bool number = from == from;
    return {number ? e.code : 0x7f, number ? e.number : bit_cast<float>(kNan)};
  }
  QK_INLINE static Encoded<float> encode_finite(float v, float, float high, float from) {
    const int32_t magnitude = bit_cast<int32_t>(v) & ~kSign, limit = bit_cast<int32_t>(high);
    return within(bit_cast<float>(magnitude < limit ? magnitude : limit), from);
  }
  QK_INLINE static Encoded<float> within(float v, float from) {
    const int32_t magnitude = bit_cast<int32_t>(v) & ~kSign, field = magnitude & 0x7f800000;
    const int32_t power = field > kLeastField ? field : kLeastField;
    const float addend =
        bit_cast<float>(power + ((23 - M) << 23) + (power >> (23 - M)) - (kLeastField >> (23 - M)));
    const float sum = bit_cast<float>(magnitude) + addend;
    const int32_t sign = bit_cast<int32_t>(from) & kSign;
    return {(bit_cast<int32_t>(sum) & 0x7f) | int32_t(uint32_t(sign) >> 24),
            bit_cast<float>(bit_cast<int32_t>(sum - addend) | sign)};
  }

  QK_INLINE static float number(uint8_t stored) {
    const int32_t magnitude = stored & 0x7f, fraction = magnitude << (23 - M);
    const int32_t normal = fraction + kLeastField - (1 << 23);
    // A subnormal code under the exponent of the smallest normal number, and that taken away.
    const float whole = bit_cast<float>(fraction + kLeastField);
    const int32_t small = bit_cast<int32_t>(whole - bit_cast<float>(kLeastField));
    const int32_t special = M == 2 && magnitude == kFinite ? 0x7f800000 : kNan;
    int32_t bits = magnitude < (1 << M) ? small : normal;
    bits = magnitude < kFinite ? bits : special;
    return bit_cast<float>(bits | int32_t(uint32_t(stored & 0x80) << 24));
  }

#ifdef __F16C__
  // Eight codes, in 16 bits each: number() is that float16 times kPower.
  static constexpr float kPower = M == 3 ? 0x1p8f : 1.0f;
  static inline __m128i as_f16(__m128i code) {
    if constexpr (M == 2) return _mm_slli_epi16(code, 8);
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(code, _mm_set1_epi16(0x80)), 8);
    const __m128i magnitude = _mm_and_si128(code, _mm_set1_epi16(0x7f));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m128i special = _mm_and_si128(nan, _mm_set1_epi16(0x7c00));
    return _mm_or_si128(_mm_or_si128(sign, special), _mm_slli_epi16(magnitude, 7));
  }
#endif

  QK_INLINE static int32_t inside(float v, float low, float high) { return between(v, low, high); }
};

template <Format>
struct StructOf;
#define QK_STRUCT(name, ...) \
  template <>                \
  struct StructOf<Format::name> : Tag<__VA_ARGS__> {};
QK_FORMATS(QK_STRUCT)
#undef QK_STRUCT

struct Numbers {
  using Storage = float;
  static constexpr bool kInteger = true;
  static constexpr int kPerByte = 1;
  QK_INLINE static float number(float stored) { return stored; }
};

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of a format of codes.
template <class F>
QK_INLINE auto with_codes(Format format, F f) {
  switch (format) {
#define QK_CASE(name, ...) \
  case Format::name: return f(Tag<__VA_ARGS__>());
    QK_FORMATS(QK_CASE)
#undef QK_CASE
    case Format::numbers: break;
  }
  __builtin_unreachable();
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// The same of formats that are known to be float ones.
template <class F>
QK_INLINE auto with_floats(Format format, F f) {
  return format == Format::float8_e5m2 ? f(StructOf<Format::float8_e5m2>())
                                       : f(StructOf<Format::float8_e4m3fn>());
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// The same, and with that of plain numbers.
template <class F>
QK_INLINE auto with_format(Format format, F f) {
  return format == Format::numbers ? f(Tag<Numbers>()) : with_codes(format, f);
}

// Bytes of a code, packed ones in a byte of their own.
QK_INLINE int64_t size_of(Format format) {
  return with_format(
      format, [](auto tag) -> int64_t { return sizeof(typename decltype(tag)::type::Storage); });
}
QK_INLINE int64_t per_byte(Format format) {
  return with_format(format, [](auto tag) -> int64_t { return decltype(tag)::type::kPerByte; });
}
QK_INLINE bool is_float(Format format) {
  return with_codes(format, [](auto tag) { return !decltype(tag)::type::Encoder::kInteger; });
}

}  // namespace
}  // namespace quantkit
