// Exact sums of errors: a block of threads for a part of what is measured together. Each thread
// keeps its sums in registers as long as its elements lie within 16 binades; what does not fit, and
// in the end the registers, go to digits in shared memory, and those to the result by atomics.
#pragma once

#include "mixed.cuh"

namespace quantkit {
namespace {

struct MeasureArgs {
  ElementwiseArgs e;    // its dims: first from state to state, then within one
  int32_t outer;        // how many of the first kind
  int64_t sets, n;      // sets of n elements
  int64_t parts, each;  // of a set, each of so many elements
  Measured* measured;
};

using Atomic = unsigned long long;

// The squares of a thread: sums of the window of its first element and of the one below it.
struct Squares {
  static constexpr int kBinades = 8;
  int window = -1;
  uint64_t sum = 0, high = 0, lower_sum = 0, lower_high = 0;

  template <class Add>
  __device__ __forceinline__ void take(uint32_t magnitude, Add add) {
    if (magnitude == 0) return;
    const Scaled s = scaled(magnitude);
    const int binade = s.position / 2, own = binade / kBinades;
    if (window < 0) window = own;
    if (own != window && own != window - 1) return for_digits_of_square(magnitude, add);
    const uint64_t whole = uint64_t(s.significand) << binade % kBinades, square = whole * whole;
    const bool lower = own != window;
    sum += lower ? 0 : square;
    high += lower ? 0 : square >> 32;
    lower_sum += lower ? square : 0;
    lower_high += lower ? square >> 32 : 0;
  }
  template <class Add>
  __device__ __forceinline__ void give(Add add) const {
    give(sum, high, window, add);
    give(lower_sum, lower_high, window - 1, add);
  }

 private:
  template <class Add>
  __device__ __forceinline__ static void give(uint64_t sum, uint64_t high, int window, Add add) {
    if (sum == 0 && high == 0) return;
    const int position = 2 * kBinades * window;
    for_digits(sum - (high << 32), position, add);
    for_digits(high, position + 32, add);
  }
};

template <class E>
__device__ __forceinline__ void measure_part(const MeasureArgs& a, int64_t item) {
  QK_SHARED(Atomic, digits, 2 * kDigits);
  QK_SHARED(Atomic, counts, 3);
  const int thread = int(threadIdx.x);
  if (thread < 2 * kDigits) digits[thread] = 0;
  if (thread < 3) counts[thread] = 0;
  __syncthreads();
  const auto of_x = [&](int k, uint64_t n) {
    if (n != 0) atomicAdd(&digits[k], Atomic(n));
  };
  const auto of_errors = [&](int k, uint64_t n) {
    if (n != 0) atomicAdd(&digits[kDigits + k], Atomic(n));
  };
  const int64_t set = divided(item, a.parts), begin = (item - set * a.parts) * a.each;
  const int64_t end = begin + a.each < a.n ? begin + a.each : a.n;
  Offsets base = a.e.start;
  move(base, a.e.dims, 0, a.outer, set);
  Squares x_squares, error_squares;
  Atomic most = 0, outside = 0, left_out = 0;
  const double low = a.e.q_min, high = a.e.q_max;
  for (int64_t i = begin + thread; i < end; i += kThreads) {
    Offsets at = base;
    move(at, a.e.dims, a.outer, a.e.count, i);
    const double scale = exact_number(a.e.scale, at.of[kScale]);
    const float x = float(load_float(a.e.x, a.e.x_type, at.of[kX]));
    const double v =
        E::kInteger ? mixed_affine(a.e.steps, x, scale, exact_number(a.e.add, at.of[kZeroPoint]))
                    : quotient_in<float>(x, scale);
    const bool inside =
        a.e.steps.round_first ? between(v, low, high) != 0 : is_inside<E>(v, low, high);
    outside += !inside && v == v;
    const Encoded<double> made = encoded<E>(a.e.format, v, low, high, v);
    const float x_hat = float(dequantized_in(a.e.steps, float(made.number),
                                             exact_number(a.e.subtract, at.of[kZeroPoint]), scale));
    const uint32_t error = uint32_t(magnitude_key(x_hat - x));
    if (error >= 0x7f800000u) {
      ++left_out;
      continue;
    }
    most = error > most ? error : most;
    x_squares.take(uint32_t(magnitude_key(x)), of_x);
    error_squares.take(error, of_errors);
  }
  x_squares.give(of_x);
  error_squares.give(of_errors);
  atomicMax(&counts[0], most);
  if (outside != 0) atomicAdd(&counts[1], outside);
  if (left_out != 0) atomicAdd(&counts[2], left_out);
  __syncthreads();
  Measured* const m = a.measured + base.of[kState];
  const auto add = [](auto* to, Atomic n) {
    if (n == 0) return;
    check_write(to, sizeof(*to));
    atomicAdd(reinterpret_cast<Atomic*>(to), n);
  };
  // Carried: a digit of the result takes 2^31 of them.
  if (thread < 2) {
    uint64_t rest = 0;
    for (int k = 0; k < kDigits; ++k) {
      rest += digits[thread * kDigits + k];
      add((thread == 0 ? m->squares : m->errors) + k, Atomic(rest & 0xffffffffu));
      rest >>= 32;
    }
  }
  if (thread == 0) {
    check_write(&m->max_error, sizeof(m->max_error));
    atomicMax(reinterpret_cast<Atomic*>(&m->max_error), counts[0]);
    add(&m->outside, counts[1]);
    add(&m->left_out, counts[2]);
  }
  __syncthreads();
}

template <class E>
__global__ void __launch_bounds__(kThreads, 2)
    measure_kernel(const __grid_constant__ MeasureArgs a) {
  for (int64_t item = blockIdx.x; item < a.sets * a.parts; item += gridDim.x)
    measure_part<E>(a, item);
}

struct FinishArgs {
  const Measured* measured;
  int64_t n;
  MeasuredOut out;
};

__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const __grid_constant__ FinishArgs a) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < a.n;
       i += gridDim.x * int64_t(kThreads))
    finish(
        a.measured[i], a.out, i, [](const auto* from) { return load(from); },
        [](auto* to, auto v) { store(to, v); });
}

}  // namespace
}  // namespace quantkit
