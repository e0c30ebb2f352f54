// Real types: float16 and bfloat16 as integers do them, and how any type becomes a float.
//
// All of numerics/ serves host and device. No torch, no SIMD, no standard library templates:
// everything has internal linkage, so that no object built with one instruction set lends code to
// another. Compiled with -ffp-contract=off (nvcc: --fmad=false -prec-div=true -ftz=false).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QK_INLINE __host__ __device__ __forceinline__
#else
#define QK_INLINE [[maybe_unused]] inline
#endif

namespace quantkit {

// The types of tensors that are read or written as numbers.
enum class Type : int32_t { f16, bf16, f32, f64, i8, u8, i16, u16, i32, u32, i64, u64, boolean };

namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

struct boolean {
  uint8_t byte;  // torch takes any but 0 for true
};

template <class To, class From>
QK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- storage types and the type their arithmetic runs in ----------------------------------------

template <class T>
struct Traits;  // Wide: computes in it. Bits: of the same size as T.
template <>
struct Traits<f16> {
  using Wide = float;
  using Bits = int16_t;
};
template <>
struct Traits<bf16> {
  using Wide = float;
  using Bits = int16_t;
};
template <>
struct Traits<float> {
  using Wide = float;
  using Bits = int32_t;
};
template <>
struct Traits<double> {
  using Wide = double;
  using Bits = int64_t;
};
template <class T>
using Wide = typename Traits<T>::Wide;

template <class T>
QK_INLINE T widen(T v) {
  return v;
}
// Compilers convert a vector of these to float with an fma; of signed ones, with the plain
// instruction.
QK_INLINE int64_t widen(uint32_t v) { return v; }
QK_INLINE int32_t widen(boolean v) { return v.byte != 0; }
QK_INLINE float widen(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
QK_INLINE float widen(f16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu, sign = uint32_t(v.bits & 0x8000u) << 16;
  // A subnormal m is the float m * 2^-24: put m under the exponent of 0.5, take 0.5 away (exact).
  const float subnormal = bit_cast<float>(magnitude | 0x3f000000u) - 0.5f;
  const uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const uint32_t normal = (magnitude << 13) + exponent;
  return bit_cast<float>((magnitude < 0x400u ? bit_cast<uint32_t>(subnormal) : normal) | sign);
}

// v rounded to T (half to even, overflow to inf), still in the wide type. NaN stays NaN.
template <class T>
QK_INLINE Wide<T> rounded(Wide<T> v) {
  return v;
}
template <>
QK_INLINE float rounded<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const float r = bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);
  return v == v ? r : v;
}
template <>
QK_INLINE float rounded<f16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits & 0x80000000u;
  const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  // Adding 2^13 times v's power of two leaves float just the bits that float16 has; below 2^-14
  // float16 has a fixed step of 2^-24, which is what 0.5 leaves.
  const float power = bit_cast<float>((bits & 0x7f800000u) + (13u << 23));
  const float shifter = magnitude < 0x1p-14f ? 0.5f : power;
  const float r = (magnitude + shifter) - shifter;
  const float limited = magnitude >= 65520.0f ? __builtin_inff() : r;
  return bit_cast<float>(bit_cast<uint32_t>(limited) | sign);
}

// Like rounded(), but ignores subnormals, infinity and NaN. Valid when the result is rounded to an
// integer code and abs(zero_point) <= 1024 is an integer.
template <class T>
QK_INLINE Wide<T> rounded_for_code(Wide<T> v) {
  return v;
}
template <>
QK_INLINE float rounded_for_code<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  return bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);
}
template <>
QK_INLINE float rounded_for_code<f16>(float v) {
  const float shifter = bit_cast<float>((bit_cast<uint32_t>(v) & 0xff800000u) + (13u << 23));
  return (v + shifter) - shifter;
}

template <class T>
QK_INLINE T narrow(Wide<T> v) {
  return v;
}
template <>
QK_INLINE bf16 narrow<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t r = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return bf16{uint16_t(v == v ? r : 0x7fc0u)};
}
template <>
QK_INLINE f16 narrow<f16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000u;
  const uint32_t absolute = bits & 0x7fffffffu;
  const float magnitude = bit_cast<float>(absolute);
  const uint32_t normal = (absolute - 0x38000000u + 0xfffu + ((absolute >> 13) & 1)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000u;
  uint32_t r = absolute < 0x38800000u ? subnormal : normal;
  r = absolute >= 0x477ff000u ? 0x7c00u : r;
  r = absolute > 0x7f800000u ? 0x7e00u : r;
  return f16{uint16_t(r | sign)};
}

template <class V>
QK_INLINE V clamp(V v, V low, V high) {
  v = v > low ? v : low;
  return v < high ? v : high;
}

// 1.5 * 2^(mantissa bits): adding it to |v| < 2^22 rounds v half to even into the low mantissa
// bits.
template <class V>
constexpr V kShifter = sizeof(V) == 4 ? V(0x1.8p23) : V(0x1.8p52);

// ---- from the enum to the type ------------------------------------------------------------------

// Stands for a type in generic code.
template <class T>
struct Tag {
  using type = T;
};
// The same for a number.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of a type.
template <class F>
QK_INLINE auto with_real(Type type, F f) {
  switch (type) {
    case Type::f16: return f(Tag<f16>());
    case Type::bf16: return f(Tag<bf16>());
    case Type::f32: return f(Tag<float>());
    case Type::f64: return f(Tag<double>());
    case Type::i8: return f(Tag<int8_t>());
    case Type::u8: return f(Tag<uint8_t>());
    case Type::i16: return f(Tag<int16_t>());
    case Type::u16: return f(Tag<uint16_t>());
    case Type::i32: return f(Tag<int32_t>());
    case Type::u32: return f(Tag<uint32_t>());
    case Type::i64: return f(Tag<int64_t>());
    case Type::u64: return f(Tag<uint64_t>());
    case Type::boolean: return f(Tag<boolean>());
  }
  __builtin_unreachable();
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of a floating type.
template <class F>
QK_INLINE auto with_float(Type type, F f) {
  switch (type) {
    case Type::f16: return f(Tag<f16>());
    case Type::bf16: return f(Tag<bf16>());
    case Type::f64: return f(Tag<double>());
    default: return f(Tag<float>());  // callers have no others
  }
}

[[maybe_unused]] constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr bool is_floating(Type type) { return type <= Type::f64; }
constexpr bool is_half(Type type) { return type <= Type::bf16; }

[[maybe_unused]] constexpr int64_t size_of(Type type) {
  constexpr int8_t sizes[] = {2, 2, 4, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1};
  return sizes[static_cast<int>(type)];
}

}  // namespace
}  // namespace quantkit
