// Kernels that take an element at a time: steps of any types, draws, gradients, packed codes and
// conversions.
#pragma once

#include "elementwise.cuh"

namespace quantkit {
namespace {

constexpr int kMixedRun = 8;  // elements of a row that a thread takes

// Calls body(offsets, element) for each element that this thread takes.
template <class Body>
__device__ __forceinline__ void for_elements(const ElementwiseArgs& a, Body body) {
  const Teams t = teams_of(a.team);
  for_parts(a, t, [&](const Offsets& row, int64_t part) {
    for (int i = 0; i < kMixedRun; ++i) {
      const int64_t element = (part * kMixedRun + i) * a.team + t.lane;
      if (element >= a.n) return;
      Offsets at;
#pragma unroll
      for (int o = 0; o < kOperands; ++o) at.of[o] = row.of[o] + element * a.stride[o];
      body(at);
    }
  });
}

// x / scale + zero_point for dtypes known at run time.
__device__ __forceinline__ double mixed_affine(const Steps& steps, double x, double scale,
                                               double zero_point) {
  const double quotient = with_float(steps.divide, [&](auto tag) -> double {
    return quotient_in<typename decltype(tag)::type>(x, scale);
  });
  if (steps.round_first) return sum_in<float>(rounded<whole>(float(quotient)), zero_point);
  return with_float(steps.add, [&](auto tag) -> double {
    return sum_in<typename decltype(tag)::type>(quotient, zero_point);
  });
}

__device__ __forceinline__ double load_float(const void* data, Type type, int64_t i) {
  return with_float(type, [&](auto tag) -> double {
    return widen(load(static_cast<const typename decltype(tag)::type*>(data) + i));
  });
}
// float64 reaches half precision through float32.
__device__ __forceinline__ void store_float(void* data, Type type, int64_t i, double v) {
  with_float(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store(static_cast<T*>(data) + i, narrow<T>(static_cast<Wide<T>>(v)));
  });
}

// y = inside ? x : 0, for any type: bits, whatever they mean, so that a NaN keeps its own.
__device__ __forceinline__ void store_selected(bool inside, const void* x, int64_t from, void* y,
                                               Type type, int64_t to) {
  const auto select_bits = [&](auto tag) {
    using Bits = typename decltype(tag)::type;
    store(static_cast<Bits*>(y) + to, inside ? load(static_cast<const Bits*>(x) + from) : Bits(0));
  };
  if (type == Type::f64)
    select_bits(Tag<int64_t>());
  else if (type == Type::f32)
    select_bits(Tag<int32_t>());
  else
    select_bits(Tag<int16_t>());
}

__device__ __forceinline__ Draws draws_of(const ElementwiseArgs& a) {
  if (a.seed == nullptr) return a.draws;
  return {uint64_t(load(a.seed)), uint64_t(load(a.seed + 1))};
}

template <class E>
__device__ __forceinline__ void quantize_mixed(const ElementwiseArgs& a) {
  const Draws draws = draws_of(a);
  const Beside beside = route_of(a.operation).beside;
  const double low = a.q_min, high = a.q_max;
  for_elements(a, [&](const Offsets& at) {
    const double scale = exact_number(a.scale, at.of[kScale]);
    const double x = load_float(a.x, a.x_type, at.of[kX]);
    const double v = E::kInteger
                         ? mixed_affine(a.steps, x, scale, exact_number(a.add, at.of[kZeroPoint]))
                         : quotient_in<float>(x, scale);
    const bool inside = a.steps.round_first || a.draws_randomly ? between(v, low, high) != 0
                                                                : is_inside<E>(v, low, high);
    if (beside == Beside::gradient)
      return store_selected(inside, a.q_in, at.of[kQ], a.y, a.y_type, at.of[kY]);
    const Encoded<double> made =
        a.draws_randomly
            ? encoded_randomly<E>(a.format, float(v), float(low), float(high),
                                  uniform(draw(uint64_t(a.first_index + at.of[kIndex]), draws)))
            : encoded<E>(a.format, v, low, high, v);
    if (beside == Beside::codes)
      store_code(a.q, a.code_bytes, at.of[kQ], int16_t(made.code));
    else if (a.q != nullptr)
      store(static_cast<uint8_t*>(a.q) + at.of[kQ], uint8_t(inside));
    if (a.y != nullptr)
      store_float(a.y, a.y_type, at.of[kY],
                  dequantized_in(a.steps, float(made.number),
                                 exact_number(a.subtract, at.of[kZeroPoint]), scale));
  });
}

__global__ void __launch_bounds__(kThreads, 2)
    quantize_mixed_kernel(const __grid_constant__ ElementwiseArgs a) {
  if (is_float(a.format))
    quantize_mixed<FloatEncoder>(a);
  else
    quantize_mixed<IntegerEncoder>(a);
}

// Codes of which several share a byte, to bytes (kThere) or from them: an element is a byte.
template <bool kThere>
__global__ void __launch_bounds__(kThreads, 2)
    repack_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    const int64_t i = at.of[kQ];
    with_codes(a.format, [&](auto tag) {
      using F = typename decltype(tag)::type;
      using C = typename F::Storage;
      if constexpr (F::kPerByte > 1) {
        C codes[F::kPerByte];
        for (int k = 0; kThere && k < F::kPerByte; ++k)
          codes[k] = load(static_cast<const C*>(a.q_in) + F::kPerByte * i + k);
        if (kThere) return store(static_cast<uint8_t*>(a.q) + i, F::packed(codes));
        const uint8_t byte = load(static_cast<const uint8_t*>(a.q_in) + i);
        for (int k = 0; k < F::kPerByte; ++k)
          store(static_cast<C*>(a.q) + F::kPerByte * i + k, F::unpacked(byte, k));
      }
    });
  });
}

__global__ void __launch_bounds__(kThreads, 2)
    dequantize_mixed_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    const float q = with_format(a.format, [&](auto tag) {
      using F = typename decltype(tag)::type;
      return F::number(load(static_cast<const typename F::Storage*>(a.q_in) + at.of[kQ]));
    });
    store_float(a.y, a.y_type, at.of[kY],
                dequantized_in(a.steps, q, exact_number(a.subtract, at.of[kZeroPoint]),
                               exact_number(a.scale, at.of[kScale])));
  });
}

__global__ void __launch_bounds__(kThreads, 2)
    masked_gradient_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    const bool inside = load(static_cast<const uint8_t*>(a.q_in) + at.of[kQ]) != 0;
    store_selected(inside, a.x, at.of[kX], a.y, a.y_type, at.of[kY]);
  });
}

template <class To>
__global__ void __launch_bounds__(kThreads, 2)
    convert_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    with_real(a.x_type, [&](auto tag) {
      using From = typename decltype(tag)::type;
      const From x = load(static_cast<const From*>(a.x) + at.of[kX]);
      store(static_cast<To*>(a.y) + at.of[kY], narrow<To>(static_cast<Wide<To>>(widen(x))));
    });
  });
}

}  // namespace
}  // namespace quantkit
