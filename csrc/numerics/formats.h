// The storage formats of codes. A new one is a struct here and a line in QK_FORMATS.
//
// A format makes a code of a number in the width of its steps, float or double, and keeps it in a
// register of that width: `encode` clips and rounds, `value` is the code's number, `stored` what
// memory gets. Loops that go both ways use one code for both. `number` is what a stored code stands
// for.
#pragma once

#include "floats.h"

namespace quantkit {

// Beside codes, dequantize takes plain numbers: any real tensor, made float32 first.
#define QK_FORMATS(X) X(i8, int8_t) X(u8, uint8_t) X(i16, int16_t)

#define QK_NAME(name, storage) name,
enum class Format : int32_t { QK_FORMATS(QK_NAME) numbers };
#undef QK_NAME

namespace {

template <int kSize>
struct SignedOf : Tag<int16_t> {};
template <>
struct SignedOf<1> : Tag<int8_t> {};

// A code in registers is the float whose low mantissa bits are the integer's.
template <class T>
struct IntegerFormat {
  using Storage = T;
  static constexpr bool kInteger = true;
  // Integers of one width are stored alike: loops that write them are those of the signed one.
  using Encoder = IntegerFormat<typename SignedOf<sizeof(T)>::type>;
  static constexpr int32_t kLow = T(-1) < T(0) ? -(1 << (8 * sizeof(T) - 1)) : 0;
  static constexpr int32_t kHigh = kLow + (1 << (8 * sizeof(T))) - 1;

  template <class V>
  using Code = typename Traits<V>::Bits;

  // clip(round(v), low, high), and 0 where `from` is NaN. The limits are integers, so clipping
  // first is the same. In bits: of a bool g++ makes bytes, and then masks them again.
  template <class V>
  QK_INLINE static Code<V> encode(V v, V low, V high, V from) {
    const Code<V> keep = from == from ? -1 : 0;
    return encode_finite(bit_cast<V>(Code<V>(bit_cast<Code<V>>(clamp(v, low, high)) & keep)));
  }
  // Where nothing is NaN, and nothing beyond the limits.
  template <class V>
  QK_INLINE static Code<V> encode_finite(V v, V low, V high) {
    return encode_finite(clamp(v, low, high));
  }
  template <class V>
  QK_INLINE static Code<V> encode_finite(V v) {
    return bit_cast<Code<V>>(v + kShifter<V>);
  }
  template <class V>
  QK_INLINE static float value(Code<V> code) {
    return float(bit_cast<V>(code) - kShifter<V>);
  }
  template <class Code>
  QK_INLINE static T stored(Code code) {
    return static_cast<T>(code);
  }
  QK_INLINE static float number(T stored) { return static_cast<float>(stored); }

  // All bits where low <= round(v) <= high before clipping, else none. NaN is clipped to low - 1,
  // and so outside.
  template <class V>
  QK_INLINE static Code<V> inside(V v, V low, V high) {
    const V r = (clamp(v, low - 1, high + 1) + kShifter<V>)-kShifter<V>;
    return Code<V>(r >= low ? -1 : 0) & Code<V>(r <= high ? -1 : 0);
  }
};

struct Numbers {
  using Storage = float;
  QK_INLINE static float number(float stored) { return stored; }
};

namespace formats {
#define QK_STRUCT(name, storage) using name = IntegerFormat<storage>;
QK_FORMATS(QK_STRUCT)
#undef QK_STRUCT
}  // namespace formats

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of a format of codes.
template <class F>
QK_INLINE auto with_codes(Format format, F f) {
  switch (format) {
#define QK_CASE(name, storage) \
  case Format::name: return f(Tag<formats::name>());
    QK_FORMATS(QK_CASE)
#undef QK_CASE
    case Format::numbers: break;
  }
  __builtin_unreachable();
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// The same, and with that of plain numbers.
template <class F>
QK_INLINE auto with_format(Format format, F f) {
  return format == Format::numbers ? f(Tag<Numbers>()) : with_codes(format, f);
}

[[maybe_unused]] int64_t size_of(Format format) {
  return with_format(
      format, [](auto tag) -> int64_t { return sizeof(typename decltype(tag)::type::Storage); });
}

}  // namespace
}  // namespace quantkit
