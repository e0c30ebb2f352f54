// The storage formats of codes. A new one is a struct here and a line in QK_FORMATS.
//
// A format says what a code is: `Storage` holds one, `number` is what it stands for. Its `Encoder`
// makes codes of numbers in the width of the steps, float or double: `encode` gives the code, in
// the low bits of a register, and its number, so that loops that go both ways decode nothing.
#pragma once

#include "philox.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace quantkit {

#define QK_FORMATS(X)                        \
  X(int8, IntegerFormat<int8_t>)             \
  X(uint8, IntegerFormat<uint8_t>)           \
  X(int16, IntegerFormat<int16_t>)           \
  X(uint16, IntegerFormat<uint16_t>)         \
  X(int4, PackedFormat<4, -8>)               \
  X(uint4, PackedFormat<4, 0>)               \
  X(int2, PackedFormat<2, -2>)               \
  X(uint2, PackedFormat<2, 0>)               \
  X(float8_e4m3fn, FloatFormat<3, -6, 448>)  \
  X(float8_e5m2, FloatFormat<2, -14, 57344>) \
  X(float4_e2m1fn, FloatFormat<1, 0, 6>)

// Beside codes, dequantize takes plain numbers (any real tensor, made float32 first) and powers of
// two, which are scales.
#define QK_NAME(name, ...) name,
enum class Format : int32_t { QK_FORMATS(QK_NAME) numbers, powers };
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

  // v clipped, then rounded up or down by u; 0 where `from` is NaN.
  QK_INLINE static Encoded<float> encode_randomly(float v, float low, float high, float from,
                                                  float u) {
    const int32_t bits = bit_cast<int32_t>(clamp(v, low, high)) & (from == from ? -1 : 0);
    const int32_t sign = bits >> 31, n = randomly_rounded(bit_cast<float>(bits & INT32_MAX), u);
    const int32_t code = (n ^ sign) - sign;
    return {code, float(code)};
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

// Codes of which several share a byte, the first in the lowest bits. Loops see them in bytes of
// their own.
template <int kBits_>
struct Packing {
  static constexpr int kBits = kBits_, kPerByte = kBits < 8 ? 8 / kBits : 1;

  // The byte of these codes.
  template <class C>
  QK_INLINE static uint8_t packed(const C* codes) {
    uint8_t byte = 0;
    for (int k = 0; k < kPerByte; ++k)
      byte |= uint8_t((uint8_t(codes[k]) & ((1 << kBits) - 1)) << k * kBits);
    return byte;
  }
  QK_INLINE static uint8_t field(uint8_t byte, int place) {
    return uint8_t(byte >> place * kBits & ((1 << kBits) - 1));
  }
};

template <int kBits, int32_t kFrom>
struct PackedFormat : Packing<kBits> {
  using Storage = int8_t;
  using Encoder = IntegerEncoder;
  static constexpr bool kInteger = true;
  static constexpr int64_t kLow = kFrom, kHigh = kFrom + (1 << kBits) - 1;

  QK_INLINE static float number(int8_t stored) { return static_cast<float>(stored); }
  QK_INLINE static int8_t unpacked(uint8_t byte, int place) {
    const int32_t sign = kFrom & ((1 << kBits) - 1);
    return int8_t((Packing<kBits>::field(byte, place) ^ sign) + kFrom);
  }
};

// A sign, an exponent whose smallest normal is kLeast, M bits of mantissa (contract 2, section 5).
template <int M, int kLeast, int kMost>
struct FloatFormat : Packing<M == 1 ? 4 : 8> {
  using Storage = uint8_t;
  using Encoder = FloatFormat;
  using Packing<M == 1 ? 4 : 8>::kBits;
  static constexpr bool kInteger = false;
  static constexpr int64_t kLow = -kMost, kHigh = kMost;
  static constexpr int kMantissa = M;
  static constexpr int32_t kLeastField = (kLeast + 127) << 23, kSign = INT32_MIN, kNan = 0x7fc00000;
  static constexpr int32_t kCodeSign = 1 << (kBits - 1), kCodes = kCodeSign - 1;
  // What stands for NaN, and the magnitude of the first code that is no finite number.
  static constexpr int32_t kNanCode = kBits == 8 ? 0x7f : 0;
  static constexpr int32_t kFinite = M == 3 ? 0x7f : M == 2 ? 0x7c : 8;

  // v clipped, then rounded; the sign is that of `from`, and so is NaN. With the power of two that
  // leaves M bits, the sum has the rounded mantissa in its last bits. The same number's last bits
  // count the binades: their sum is the code. They are even, so that ties stay.
  QK_INLINE static Encoded<float> encode(float v, float, float high, float from) {
    const Encoded<float> e = encode_finite(v, 0, high, from);
    const bool number = from == from;
    return {number ? e.code : kNanCode,
            number ? e.number : bit_cast<float>(kNanCode == 0 ? 0 : kNan)};
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
    return {(bit_cast<int32_t>(sum) & kCodes) | int32_t(uint32_t(sign) >> (32 - kBits)),
            bit_cast<float>(bit_cast<int32_t>(sum - addend) | sign)};
  }

  // v clipped, then rounded up or down by u to a number of the format.
  QK_INLINE static Encoded<float> encode_randomly(float v, float, float high, float from, float u) {
    const int32_t bits = bit_cast<int32_t>(v) & ~kSign, limit = bit_cast<int32_t>(high);
    const int32_t magnitude = bits < limit ? bits : limit, field = magnitude & 0x7f800000;
    const int32_t power = field > kLeastField ? field : kLeastField;
    const float to_steps = bit_cast<float>((uint32_t(254 + M) << 23) - uint32_t(power));
    const int32_t n = randomly_rounded(bit_cast<float>(magnitude) * to_steps, u);
    const int32_t sign = bit_cast<int32_t>(from) & kSign;
    const int32_t code =
        (n + ((power - kLeastField) >> (23 - M))) | int32_t(uint32_t(sign) >> (32 - kBits));
    const int32_t number = bit_cast<int32_t>(float(n) * bit_cast<float>(power - (M << 23))) | sign;
    const int32_t keep = from == from ? -1 : 0;  // by masks: g++ makes branches of ternaries here
    return {(code & keep) | (kNanCode & ~keep),
            bit_cast<float>((number & keep) | ((kNanCode == 0 ? 0 : kNan) & ~keep))};
  }

  QK_INLINE static float number(uint8_t stored) {
    const int32_t magnitude = stored & kCodes, fraction = magnitude << (23 - M);
    const int32_t normal = fraction + kLeastField - (1 << 23);
    // A subnormal code under the exponent of the smallest normal number, and that taken away.
    const float whole = bit_cast<float>(fraction + kLeastField);
    const int32_t small = bit_cast<int32_t>(whole - bit_cast<float>(kLeastField));
    const int32_t special = M == 2 && magnitude == kFinite ? 0x7f800000 : kNan;
    int32_t bits = magnitude < (1 << M) ? small : normal;
    bits = magnitude < kFinite ? bits : special;
    return bit_cast<float>(bits | int32_t(uint32_t(stored & kCodeSign) << (32 - kBits)));
  }
  QK_INLINE static uint8_t unpacked(uint8_t byte, int place) {
    return Packing<kBits>::field(byte, place);
  }

#ifdef __F16C__
  // Eight codes, in 16 bits each: number() is that float16 times kPower, by its bits 2^kShift.
  static constexpr int kShift = M == 3 ? 8 : M == 2 ? 0 : 14;
  static constexpr float kPower = float(1 << kShift);
  // Of scales below it in magnitude the product with kPower is finite.
  static constexpr float kScales = 0x1p126f / kPower * 2;
  static inline __m128i as_f16(__m128i code) {
    if constexpr (M == 2) return _mm_slli_epi16(code, 8);
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(code, _mm_set1_epi16(kCodeSign)), 16 - kBits);
    const __m128i magnitude = _mm_and_si128(code, _mm_set1_epi16(kCodes));
    const __m128i number = _mm_or_si128(sign, _mm_slli_epi16(magnitude, 10 - M));
    if constexpr (M == 1) return number;
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    return _mm_or_si128(number, _mm_and_si128(nan, _mm_set1_epi16(0x7c00)));
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

// 2^(code - 127), and NaN for 255: scales of E8M0, the exponent fields of float32.
QK_INLINE float power_of_two(int32_t code) {
  return bit_cast<float>(code == 0 ? 1 << 22 : code == 255 ? 0x7fc00000 : code << 23);
}
struct Powers {
  using Storage = uint8_t;
  static constexpr bool kInteger = true;
  static constexpr int kPerByte = 1;
  QK_INLINE static float number(uint8_t stored) { return power_of_two(stored); }
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
    case Format::numbers:
    case Format::powers: break;
  }
  __builtin_unreachable();
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// The same of formats that are known to be float ones.
template <class F>
QK_INLINE auto with_floats(Format format, F f) {
  switch (format) {
    case Format::float8_e5m2: return f(StructOf<Format::float8_e5m2>());
    case Format::float4_e2m1fn: return f(StructOf<Format::float4_e2m1fn>());
    default: return f(StructOf<Format::float8_e4m3fn>());
  }
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// The same, and with those of plain numbers and of powers of two.
template <class F>
QK_INLINE auto with_format(Format format, F f) {
  if (format == Format::numbers) return f(Tag<Numbers>());
  return format == Format::powers ? f(Tag<Powers>()) : with_codes(format, f);
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
  return with_format(format, [](auto tag) { return !decltype(tag)::type::kInteger; });
}

}  // namespace
}  // namespace quantkit
