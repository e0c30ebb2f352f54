// Products of unsigned by signed bytes, four at a time in each sum (vpdpbusd). Compilers find the
// instruction, but not the blocks: with 4 by 4 sums in registers a vector is loaded for two products.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace quantkit {
namespace {

constexpr int kBlock = 4;

// The sum of each vector of the four, in their order.
__m128i sums_of_vectors(const __m512i (&v)[kBlock]) {
  const auto pairs = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_maskz_unpacklo_epi32(0xffff, a, b),
                            _mm512_maskz_unpackhi_epi32(0xffff, a, b));
  };
  const __m512i ab = pairs(v[0], v[1]), cd = pairs(v[2], v[3]);
  const __m512i lanes = _mm512_add_epi32(_mm512_maskz_unpacklo_epi64(0xff, ab, cd),
                                         _mm512_maskz_unpackhi_epi64(0xff, ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_maskz_extracti32x8_epi32(0xff, lanes, 0),
                                        _mm512_maskz_extracti32x8_epi32(0xff, lanes, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Adds the sums of n products of kTokens rows of x and four rows of w: unsigned bytes, or
// signed ones to which 128 is to be added. kFetch: the next four rows are fetched from memory.
template <int kTokens, bool kSigned, bool kFetch>
void add_block(const int8_t* x, int64_t x_stride, const void* w, int64_t stride, int64_t n,
               int32_t* sums, int64_t sums_stride) {
  __m512i made[kTokens][kBlock];
  for (auto& row : made)
    for (__m512i& sum : row) sum = _mm512_setzero_si512();
  const auto add = [&](int64_t k, __mmask64 which) {
    __m512i rows[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      rows[i] = _mm512_maskz_loadu_epi8(which, static_cast<const int8_t*>(w) + i * stride + k);
      if (kSigned) rows[i] = _mm512_xor_si512(rows[i], _mm512_set1_epi8(-128));
      if (kFetch)
        _mm_prefetch(static_cast<const char*>(w) + (i + kBlock) * stride + k, _MM_HINT_T0);
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512i v = _mm512_maskz_loadu_epi8(which, x + t * x_stride + k);
      for (int i = 0; i < kBlock; ++i) made[t][i] = _mm512_dpbusd_epi32(made[t][i], rows[i], v);
    }
  };
  int64_t k = 0;
  for (; k + 64 <= n; k += 64) add(k, ~__mmask64(0));
  if (k < n) add(k, (__mmask64(1) << (n - k)) - 1);
  for (int t = 0; t < kTokens; ++t) {
    __m128i* const to = reinterpret_cast<__m128i*>(sums + t * sums_stride);
    _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), sums_of_vectors(made[t])));
  }
}

}  // namespace
}  // namespace quantkit
