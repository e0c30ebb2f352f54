// Products of 32-bit integers in 64 bits. In plain C++ compilers make full products of 64 bits of
// them: vpmullq, three times as slow, or three vpmuludq with AVX2.
#pragma once

#include "../numerics/philox.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

#if defined(__AVX512F__)
struct Wide64 {
  using Register = __m512i;
  static constexpr int64_t kElements = 16;
  static Register load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Register a) { _mm512_storeu_si512(p, a); }
  static Register all(uint64_t a) { return _mm512_set1_epi64(int64_t(a)); }
  // With a mask of all: g++ 12 warns of the others' own undefined register.
  static Register product(Register a, Register b) { return _mm512_maskz_mul_epu32(0xff, a, b); }
  static Register lower(Register a) { return _mm512_maskz_slli_epi64(0xff, a, 32); }
  static Register upper(Register a) { return _mm512_maskz_srli_epi64(0xff, a, 32); }
  static Register add(Register a, Register b) { return _mm512_add_epi64(a, b); }
  static Register either(Register a, Register b) { return _mm512_xor_si512(a, b); }
  // Of each pair of numbers of a and b, the first; and the second.
  static Register firsts(Register a, Register b) { return _mm512_maskz_unpacklo_epi64(0xff, a, b); }
  static Register seconds(Register a, Register b) {
    return _mm512_maskz_unpackhi_epi64(0xff, a, b);
  }
};
#elif defined(__AVX2__)
struct Wide64 {
  using Register = __m256i;
  static constexpr int64_t kElements = 8;
  static Register load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Register a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static Register all(uint64_t a) { return _mm256_set1_epi64x(int64_t(a)); }
  static Register product(Register a, Register b) { return _mm256_mul_epu32(a, b); }
  static Register lower(Register a) { return _mm256_slli_epi64(a, 32); }
  static Register upper(Register a) { return _mm256_srli_epi64(a, 32); }
  static Register add(Register a, Register b) { return _mm256_add_epi64(a, b); }
  static Register either(Register a, Register b) { return _mm256_xor_si256(a, b); }
  static Register firsts(Register a, Register b) { return _mm256_unpacklo_epi64(a, b); }
  static Register seconds(Register a, Register b) { return _mm256_unpackhi_epi64(a, b); }
};
#endif

// Draws of the elements from 8 * first on, `counters` times eight and up to kSpareDraws more.
constexpr int64_t kSpareDraws = 256;
void fill_draws(uint16_t* draws, uint64_t first, int64_t counters, const Draws& from) {
  int64_t i = 0;
#ifdef __AVX2__
  // A counter in each lane of 64 bits, whose upper half is of no account. Lanes are ordered so that
  // pairs of words come out one after the other.
  using W = Wide64;
  using Register = typename W::Register;
  constexpr int kLanes = sizeof(Register) / 8, kSets = kLanes / 2;  // as many as registers hold
  uint64_t lanes[kLanes];
  for (int k = 0; k < kLanes; ++k) lanes[k] = k / 2 + k % 2 * (kLanes / 2);
  for (; i < counters; i += kLanes * kSets) {
    Register a[kSets], b[kSets], c[kSets], d[kSets];
    for (int k = 0; k < kSets; ++k) {
      a[k] = W::add(W::load(lanes), W::all(first + i + k * kLanes));
      b[k] = W::upper(a[k]);
      c[k] = W::all(from.stream);
      d[k] = W::all(from.stream >> 32);
    }
    PhiloxKey key(from.seed);
    for (int round = 0; round < kPhiloxRounds; ++round, key.next()) {
      for (int k = 0; k < kSets; ++k) {
        const Register from_a = W::product(a[k], W::all(kPhiloxFirst));
        const Register from_c = W::product(c[k], W::all(kPhiloxSecond));
        a[k] = W::either(W::either(W::upper(from_c), b[k]), W::all(key.first));
        c[k] = W::either(W::either(W::upper(from_a), d[k]), W::all(key.second));
        b[k] = from_c;
        d[k] = from_a;
      }
    }
    for (int k = 0; k < kSets; ++k) {
      const auto pair = [](Register low, Register high) {
        return W::either(W::upper(W::lower(low)), W::lower(high));
      };
      const Register ab = pair(a[k], b[k]), cd = pair(c[k], d[k]);
      uint16_t* const to = draws + (i + k * kLanes) * kDrawsOfWords;
      W::store(to, W::firsts(ab, cd));
      W::store(to + sizeof(Register) / 2, W::seconds(ab, cd));
    }
  }
#endif
  for (; i < counters; ++i) {
    const Words w = philox(first + i, from);
    for (int k = 0; k < kDrawsOfWords; ++k)
      draws[i * kDrawsOfWords + k] = uint16_t(w.word[k / 2] >> 16 * (k % 2));
  }
}

}  // namespace
}  // namespace quantkit
