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

// Where the results of each block go: its sums rounded to double, or where `digits` is not null their
// digits, those of squares and of errors side by side; the counts of those outside and left out likewise.
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

// A sum as a double, rounded once, of its carried digits from the lowest on. Of 55 bits from the
// first that is 1, the last also stands for all below it: their conversion rounds as the whole
// number would.
class RoundedSum {
 public:
  QK_INLINE void take(uint64_t digit) {
    if (digit != 0)
      top_ = place_, first_ = digit, second_ = before_, third_ = before_that_, rest_ = below_;
    ++place_;
    below_ |= before_that_;
    before_that_ = before_;
    before_ = digit;
  }

  QK_INLINE double get() const {
    if (first_ == 0) return 0;
    int length = 0;
    while (first_ >> length != 0) ++length;
    const int shift = 55 - length;  // 23 to 54: how far the first digit moves up
    uint64_t bits = first_ << shift, rest = rest_;
    if (shift >= 32) {
      bits |= second_ << (shift - 32) | third_ >> (64 - shift);
      rest |= third_ & ((uint64_t(1) << (64 - shift)) - 1);
    } else {
      bits |= second_ >> (32 - shift);
      rest |= (second_ & ((uint64_t(1) << (32 - shift)) - 1)) | third_;
    }
    const int exponent = 32 * top_ - shift - kPlaces;  // of the last bit
    return double(int64_t(bits | (rest != 0 ? 1 : 0))) *
           bit_cast<double>(uint64_t(exponent + 1023) << 52);
  }

 private:
  int place_ = 0, top_ = 0;
  uint64_t first_ = 0, second_ = 0, third_ = 0, rest_ = 0;  // from the top, and all below
  uint64_t before_ = 0, before_that_ = 0, below_ = 0;       // of the digit that comes next
};

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

// Gives put(address, value) the results of a block, which load(address) reads. No array is made of
// the digits: a GPU keeps none in registers.
template <class Load, class Put>
QK_INLINE void finish(const Measured& m, const MeasuredOut& out, int64_t block, Load load,
                      Put put) {
  for (int which = 0; which < 2; ++which) {
    const uint64_t* const digits = which == 0 ? m.squares : m.errors;
    RoundedSum sum;
    uint64_t rest = 0;
    for (int k = 0; k < kDigits; ++k) {
      rest += load(digits + k);
      const uint64_t digit = rest & 0xffffffffu;
      rest >>= 32;
      sum.take(digit);
      if (out.digits != nullptr)
        put(out.digits + (2 * block + which) * kDigits + k, int64_t(digit));
    }
    if (out.digits == nullptr) put((which == 0 ? out.squares : out.errors) + block, sum.get());
  }
  put(out.max_error + block, bit_cast<float>(int32_t(load(&m.max_error))));
  put(out.counts + 2 * block, load(&m.outside));
  put(out.counts + 2 * block + 1, load(&m.left_out));
}

}  // namespace
}  // namespace quantkit
