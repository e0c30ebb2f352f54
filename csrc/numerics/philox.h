// Random numbers that depend on a seed and an element's index alone: Philox4x32-10 (Salmon et al.,
// 2011), whose counter is the index. Not for cryptography.
#pragma once

#include "floats.h"

namespace quantkit {
namespace {

constexpr uint32_t kPhiloxFirst = 0xd2511f53u, kPhiloxSecond = 0xcd9e8d57u;  // multipliers
constexpr int kPhiloxRounds = 10;

// The two words of a round's key.
struct PhiloxKey {
  uint32_t first, second;

  QK_INLINE explicit PhiloxKey(uint64_t seed)
      : first(uint32_t(seed)), second(uint32_t(seed >> 32)) {}
  QK_INLINE void next() { first += 0x9e3779b9u, second += 0xbb67ae85u; }
};

// What a call draws from: contract 2's int64 seed and stream.
struct Draws {
  uint64_t seed, stream;
};

struct Words {
  uint32_t word[4];
};
QK_INLINE Words philox(uint64_t counter, const Draws& draws) {
  uint32_t a = uint32_t(counter), b = uint32_t(counter >> 32);
  uint32_t c = uint32_t(draws.stream), d = uint32_t(draws.stream >> 32);
  PhiloxKey key(draws.seed);
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) {
    const uint64_t from_a = uint64_t(a) * kPhiloxFirst;
    const uint64_t from_c = uint64_t(c) * kPhiloxSecond;
    a = uint32_t(from_c >> 32) ^ b ^ key.first;
    c = uint32_t(from_a >> 32) ^ d ^ key.second;
    b = uint32_t(from_c);
    d = uint32_t(from_a);
  }
  return {{a, b, c, d}};
}

// Eight elements share four words, each with half of one: 16 bits.
constexpr int kDrawsOfWords = 8;
QK_INLINE uint16_t draw(uint64_t index, const Draws& draws) {
  const Words w = philox(index / kDrawsOfWords, draws);
  const uint32_t low = index & 2 ? w.word[1] : w.word[0], high = index & 2 ? w.word[3] : w.word[2];
  return uint16_t((index & 4 ? high : low) >> 16 * (index % 2));
}

// (2 draw + 1) 2^-17: above 0, below 1, never a multiple of 2^-16.
QK_INLINE float uniform(uint16_t draw) {
  return bit_cast<float>(uint32_t(draw) << 7 | 0x3f800040u) - 1.0f;
}

// A magnitude rounded up or down to an integer: up where its fraction is above u, which the sign of
// the difference says.
QK_INLINE int32_t randomly_rounded(float magnitude, float u) {
  const int32_t whole = int32_t(magnitude);
  return whole + int32_t(bit_cast<uint32_t>(u - (magnitude - float(whole))) >> 31);
}

}  // namespace
}  // namespace quantkit
