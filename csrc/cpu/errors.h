// Exact sums over a chunk: squares as integers, in loops that the compiler vectorises.
#pragma once

#include "../numerics/reductions.h"
#include "../numerics/sums.h"
#include "rows.h"

namespace quantkit {
namespace {

// Of n elements: which errors are finite, both factors of their squares (0 for the others), and the
// greatest magnitude of each, as bits.
struct Finite {
  int32_t most_x, most_error, left_out;
};
Finite finite_errors(const float* __restrict x, const float* __restrict x_hat,
                     float* __restrict kept, float* __restrict error, int64_t n) {
  int32_t most_x = 0, most_error = 0, left_out = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float e = x_hat[i] - x[i];
    const int32_t magnitude = magnitude_key(e), keep = magnitude < 0x7f800000 ? -1 : 0;
    const int32_t of_x = magnitude_key(x[i]) & keep, of_error = magnitude & keep;
    kept[i] = bit_cast<float>(of_x);
    error[i] = bit_cast<float>(of_error);
    most_x = larger(most_x, of_x);
    most_error = larger(most_error, of_error);
    left_out += keep + 1;
  }
  return {most_x, most_error, left_out};
}

int64_t count_of(const uint8_t* __restrict bytes, int64_t n) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += bytes[i];
  return count;
}

// Squares are exact as doubles. They are added in two parts, each an integer times a power of two, by
// sums that begin at start(position) and stay in its binade: there doubles are the multiples of
// 2^(position - kPlaces). Of kChunk squares a lane takes 2^5.
constexpr int kLanes = 32;
constexpr int kPartBits = 47;  // from one part to the other: a binade has 52, the lanes take 5
double start(int position) {
  return bit_cast<double>(uint64_t(1023 + 52 + position - kPlaces) << 52) * 1.5;
}
// Adds the squares of n magnitudes, those from the bits `least` on. The bits of the others.
int32_t add_squares_from(int32_t least, const float* __restrict v, int64_t n,
                         double* __restrict upper, double* __restrict lower) {
  int32_t others = 0;
  for (int64_t i = 0; i < n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) {
      const int32_t bits = bit_cast<int32_t>(v[i + k]), taken = bits >= least ? bits : 0;
      others |= bits ^ taken;
      const double number = bit_cast<float>(taken), square = number * number;
      const double sum = upper[k] + square;
      lower[k] += square - (sum - upper[k]);
      upper[k] = sum;
    }
  return others;
}

// Adds the squares of n magnitudes up to `most`, of a chunk, and overwrites them: from the greatest
// down, 23 binades at a time. Most chunks have no more.
void add_squares(float* v, int64_t n, int32_t most, uint64_t* digits) {
  const auto add = [&](int k, uint64_t amount) { digits[k] += amount; };
  int64_t end = n;
  while (end % kLanes != 0) v[end++] = 0;
  while (most != 0) {
    // A square is an integer below 2^48 at the position 2 * (field - 1), of its exponent field.
    const int field = most >> 23, position = larger(0, 2 * field - kPartBits);
    const int32_t least = position == 0 ? 0 : ((position + 1) / 2 + 1) << 23;
    const double first[] = {start(position + kPartBits), start(position)};
    double upper[kLanes], lower[kLanes];
    for (int k = 0; k < kLanes; ++k) upper[k] = first[0], lower[k] = first[1];
    const int32_t others = add_squares_from(least, v, end, upper, lower);
    int64_t sums[2] = {};
    for (int k = 0; k < kLanes; ++k) {
      sums[0] += bit_cast<int64_t>(upper[k]) - bit_cast<int64_t>(first[0]);
      sums[1] += bit_cast<int64_t>(lower[k]) - bit_cast<int64_t>(first[1]);
    }
    sums[0] += sums[1] >> kPartBits;  // the lower sum may be negative
    for_digits(uint64_t(sums[0]), position + kPartBits, add);
    for_digits(uint64_t(sums[1]) & ((uint64_t(1) << kPartBits) - 1), position, add);
    if (others == 0) return;
    most = 0;
    for (int64_t i = 0; i < end; ++i) {
      const int32_t bits = bit_cast<int32_t>(v[i]), left = bits < least ? bits : 0;
      v[i] = bit_cast<float>(left);
      most = larger(most, left);
    }
  }
}

}  // namespace
}  // namespace quantkit
