// Products of 32-bit integers in 64 bits. In plain C++ compilers make full products of 64 bits of
// them: vpmullq, three times as slow, or three vpmuludq with AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

// Sums of 64-bit numbers modulo 2^64, and of their upper halves.
struct Halves {
  uint64_t sum = 0, high = 0;

  void add(uint64_t number) {
    sum += number;
    high += number >> 32;
  }
};

#if defined(__AVX512F__)
struct Wide64 {
  using Register = __m512i;
  static constexpr int64_t kElements = 16;
  static Register load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  // With a mask of all: g++ 12 warns of the others' own undefined register.
  static Register square(Register a) { return _mm512_maskz_mul_epu32(0xff, a, a); }
  static Register upper(Register a) { return _mm512_maskz_srli_epi64(0xff, a, 32); }
  static Register add(Register a, Register b) { return _mm512_add_epi64(a, b); }
  static Register zero() { return _mm512_setzero_si512(); }
};
#elif defined(__AVX2__)
struct Wide64 {
  using Register = __m256i;
  static constexpr int64_t kElements = 8;
  static Register load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Register square(Register a) { return _mm256_mul_epu32(a, a); }
  static Register upper(Register a) { return _mm256_srli_epi64(a, 32); }
  static Register add(Register a, Register b) { return _mm256_add_epi64(a, b); }
  static Register zero() { return _mm256_setzero_si256(); }
};
#endif

// The squares of n numbers.
Halves squares_of(const uint32_t* v, int64_t n) {
  Halves total;
  int64_t i = 0;
#ifdef __AVX2__
  using W = Wide64;
  typename W::Register sum = W::zero(), high = W::zero();
  for (; i + W::kElements <= n; i += W::kElements) {
    const auto pairs = W::load(v + i), even = W::square(pairs), odd = W::square(W::upper(pairs));
    sum = W::add(sum, W::add(even, odd));
    high = W::add(high, W::add(W::upper(even), W::upper(odd)));
  }
  uint64_t sums[sizeof(sum) / 8], highs[sizeof(high) / 8];
  memcpy(sums, &sum, sizeof(sum));
  memcpy(highs, &high, sizeof(high));
  for (size_t k = 0; k < sizeof(sum) / 8; ++k) total.sum += sums[k], total.high += highs[k];
#endif
  for (; i < n; ++i) total.add(uint64_t(v[i]) * v[i]);
  return total;
}

}  // namespace
}  // namespace quantkit
