// Exact sums of squares of float32 numbers (contract 2, section 8): 2^298 times the sum is an
// integer, kept in digits of 32 bits. Integers have no order, so no split of the work shows.
#pragma once

#include "floats.h"

namespace quantkit {

constexpr int kDigits = 19;   // they hold 2^54 squares
constexpr int kPlaces = 298;  // binary places: the square of the least float has 298

// What is measured over one block, before it is rounded. Plain words, so that atomics reach them.
struct Measured {
  uint64_t squares[kDigits], errors[kDigits];  // digits of the sums; up to 2^31 additions each
  int64_t max_error;                           // bits of a float
  int64_t outside, left_out;
};

// Where the results of each block go: its sums rounded to double or (squares is null) their digits,
// those of squares and of errors side by side; the counts of those outside and left out likewise.
struct MeasuredOut {
  double *squares, *errors;
  int64_t* digits;
  float* max_error;
  int64_t* counts;
};

namespace {

// Calls add(k, n) for the digits k of number * 2^position.
template <class Add>
QK_INLINE void for_digits(uint64_t number, int position, Add add) {
  const int k = position / 32, shift = position % 32;
  const uint64_t low = (number & 0xffffffffu) << shift, high = (number >> 32) << shift;
  add(k, low & 0xffffffffu);
  add(k + 1, (low >> 32) + (high & 0xffffffffu));
  add(k + 2, high >> 32);
}

// A float is significand * 2^((position - kPlaces) / 2), where position is even.
struct Scaled {
  uint32_t significand;
  int position;
};
QK_INLINE Scaled scaled(uint32_t magnitude) {
  const uint32_t field = magnitude >> 23, fraction = magnitude & 0x7fffffu;
  return {field == 0 ? fraction : fraction | 0x800000u, field == 0 ? 0 : int(2 * (field - 1))};
}
// Adds the square of a finite float of these bits.
template <class Add>
QK_INLINE void for_digits_of_square(uint32_t magnitude, Add add) {
  const Scaled s = scaled(magnitude);
  for_digits(uint64_t(s.significand) * s.significand, s.position, add);
}

// Brings every digit below 2^32.
QK_INLINE void carry(uint64_t* digits) {
  uint64_t rest = 0;
  for (int k = 0; k < kDigits; ++k) {
    rest += digits[k];
    digits[k] = rest & 0xffffffffu;
    rest >>= 32;
  }
}

// The sum as a double, rounded once, of digits that were carried. Of 55 bits from the first that
// is 1, the last also stands for all below it: their conversion rounds as the whole number would.
QK_INLINE double rounded_sum(const uint64_t* digits) {
  int top = kDigits - 1;
  while (top > 0 && digits[top] == 0) --top;
  if (digits[top] == 0) return 0;
  int length = 0;
  while (digits[top] >> length != 0) ++length;
  const auto digit = [&](int k) { return k < 0 ? uint64_t(0) : digits[k]; };
  // The three digits at the top, from the first bit that is 1: 55 of their bits, and the rest.
  const int shift = 55 - length;  // 23 to 54: how far the first digit moves up
  const uint64_t second = digit(top - 1), third = digit(top - 2);
  uint64_t bits = digits[top] << shift, rest;
  if (shift >= 32) {
    bits |= second << (shift - 32) | third >> (64 - shift);
    rest = third & ((uint64_t(1) << (64 - shift)) - 1);
  } else {
    bits |= second >> (32 - shift);
    rest = (second & ((uint64_t(1) << (32 - shift)) - 1)) | third;
  }
  for (int k = top - 3; k >= 0; --k) rest |= digits[k];
  const int exponent = 32 * top - shift - kPlaces;  // of the last bit
  return double(int64_t(bits | (rest != 0 ? 1 : 0))) *
         bit_cast<double>(uint64_t(exponent + 1023) << 52);
}

// Adds what was measured of another part of the same block.
QK_INLINE void join(Measured& to, const Measured& from) {
  for (int k = 0; k < kDigits; ++k) {
    to.squares[k] += from.squares[k];
    to.errors[k] += from.errors[k];
  }
  carry(to.squares);
  carry(to.errors);
  to.max_error = to.max_error > from.max_error ? to.max_error : from.max_error;
  to.outside += from.outside;
  to.left_out += from.left_out;
}

// Gives put(address, value) the results of a block.
template <class Put>
QK_INLINE void finish(Measured m, const MeasuredOut& out, int64_t block, Put put) {
  carry(m.squares);
  carry(m.errors);
  if (out.squares != nullptr) {
    put(out.squares + block, rounded_sum(m.squares));
    put(out.errors + block, rounded_sum(m.errors));
  } else {
    for (int k = 0; k < kDigits; ++k) {
      put(out.digits + 2 * block * kDigits + k, int64_t(m.squares[k]));
      put(out.digits + (2 * block + 1) * kDigits + k, int64_t(m.errors[k]));
    }
  }
  put(out.max_error + block, bit_cast<float>(int32_t(m.max_error)));
  put(out.counts + 2 * block, m.outside);
  put(out.counts + 2 * block + 1, m.left_out);
}

}  // namespace
}  // namespace quantkit
