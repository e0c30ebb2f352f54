// Exact sums over a chunk: squares as integers, in loops that the compiler vectorises.
#pragma once

#include "products.h"
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

// Magnitudes as integers below 2^31 in two windows of kBinades each, 0 where they lie elsewhere:
// `least` are the bits from which on a window holds them, `power` what makes them integers. The bits
// of those below both.
constexpr int kBinades = 8;
struct Window {
  int32_t field;  // the exponent field of its lowest binade

  int32_t least() const { return field << 23; }
  float power() const { return bit_cast<float>((150 + 127 - field) << 23); }
  // Of the sums of squares.
  int position() const { return 2 * (field - 1); }
};
int32_t integers_of(const float* __restrict v, uint32_t* __restrict upper,
                    uint32_t* __restrict lower, Window top, Window bottom, int64_t n) {
  const int32_t top_least = top.least(), bottom_least = bottom.least();
  const float top_power = top.power(), bottom_power = bottom.power();
  int32_t below = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = bit_cast<int32_t>(v[i]);
    const int32_t in_top = bits >= top_least ? bits : 0, others = bits ^ in_top;
    const int32_t in_bottom = others >= bottom_least ? others : 0;
    below |= others ^ in_bottom;
    upper[i] = int32_t(bit_cast<float>(in_top) * top_power);
    lower[i] = int32_t(bit_cast<float>(in_bottom) * bottom_power);
  }
  return below;
}

// Adds the squares of n magnitudes up to `most`, of a chunk: those in two windows from the top down
// as sums of integers, the few below one by one.
void add_squares(const float* v, int64_t n, int32_t most, uint64_t* digits) {
  if (most == 0) return;
  const auto add = [&](int k, uint64_t amount) { digits[k] += amount; };
  const Window top{(most >> 23) - kBinades + 1}, bottom{top.field - kBinades};
  int32_t limit = INT32_MAX;
  if (bottom.field >= 150 - 127) {  // else the powers would not be floats
    uint32_t integers[2][kChunk];
    const int32_t below = integers_of(v, integers[0], integers[1], top, bottom, n);
    for (int w = 0; w < 2; ++w) {
      const Halves sums = squares_of(integers[w], n);
      const int position = (w == 0 ? top : bottom).position();
      for_digits(sums.sum - (sums.high << 32), position, add);  // the lower halves
      for_digits(sums.high, position + 32, add);
    }
    if (below == 0) return;
    limit = bottom.least();
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = bit_cast<int32_t>(v[i]);
    if (bits < limit) for_digits_of_square(bits, add);
  }
}

}  // namespace
}  // namespace quantkit
