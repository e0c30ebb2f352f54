// Exact products of integers, and what linear layers make of them. Plain loops, which g++ turns into
// pmaddwd, and into vpdpbusd where the instruction set has it.
#pragma once

#include "../calls.h"
#ifdef __AVX512VNNI__
#include "dots.h"
#endif

namespace quantkit {
namespace {

constexpr int64_t kOutputs = 128;  // a task's rows of q,
constexpr int64_t kRows = 4;       // so many of them at a time,
constexpr int64_t kTokens = 64;    // and its rows of x at most
constexpr int64_t kDepth = 4096;   // as many columns at a time: no sum of theirs exceeds int32
constexpr int64_t kFew = 16;       // tokens for which q is not worth a copy
constexpr int64_t kApart = kDepth + 64;  // of a copy's rows: not in the same lines of the cache

// The sums of n products of x and of each of kCount rows of w, which lie `stride` apart.
template <int kCount, class X, class W>
void products(const X* __restrict x, const W* __restrict w, int64_t stride, int64_t n,
              int32_t* __restrict sums) {
  int32_t made[kCount] = {};
  for (int64_t k = 0; k < n; ++k)
    for (int i = 0; i < kCount; ++i) made[i] += int32_t(x[k]) * int32_t(w[i * stride + k]);
  for (int i = 0; i < kCount; ++i) sums[i] += made[i];
}

// Products of 16 bits by 16 bits: both sides are widened.
struct Widened {
  static constexpr int64_t kMost = 1 << 15;  // codes of x: in the core's own cache
  struct Codes {                             // of some rows of x, n columns of each
    alignas(64) int16_t of[kMost];
    int64_t stride;

    Codes(const int8_t* x, int64_t apart, int64_t rows, int64_t n) : stride(n) {
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t k = 0; k < n; ++k) of[t * n + k] = x[t * apart + k];
    }
  };
  static void unwanted(const Codes&, int64_t, int64_t, int32_t*) {}

  template <int kCount>
  static void add(const Codes& x, int64_t tokens, const int8_t* q, int64_t stride, int64_t n,
                  int32_t* sums) {
    alignas(64) int16_t w[kCount * kDepth];
    for (int i = 0; i < kCount; ++i)
      for (int64_t k = 0; k < n; ++k) w[i * kDepth + k] = q[i * stride + k];
    for (int64_t t = 0; t < tokens; ++t)
      products<kCount>(x.of + t * x.stride, w, kDepth, n, sums + t * kOutputs);
  }
};

#ifdef __AVX512VNNI__
// Products of unsigned by signed bytes: 128 is added to q, and 128 times the sum of x taken off.
struct Products {
  static constexpr int64_t kMost = kTokens * kDepth;
  struct Codes {
    const int8_t* of;
    int64_t stride;

    Codes(const int8_t* x, int64_t apart, int64_t, int64_t) : of(x), stride(apart) {}
  };
  static void unwanted(const Codes& x, int64_t tokens, int64_t n, int32_t* sums) {
    alignas(64) uint8_t added[kDepth];
    for (int64_t k = 0; k < n; ++k) added[k] = 128;
    int64_t t = 0;
    for (; t + kRows <= tokens; t += kRows)
      products<kRows>(added, x.of + t * x.stride, x.stride, n, sums + t);
    for (; t < tokens; ++t) products<1>(added, x.of + t * x.stride, x.stride, n, sums + t);
  }

  template <int kCount>
  static void add(const Codes& x, int64_t tokens, const int8_t* q, int64_t stride, int64_t n,
                  int32_t* sums) {
    if (kCount == kBlock && tokens <= kFew) return add_blocks<true>(x, tokens, q, stride, n, sums);
    alignas(64) uint8_t w[kCount * kApart];
    for (int i = 0; i < kCount; ++i)
      for (int64_t k = 0; k < n; ++k) w[i * kApart + k] = uint8_t(q[i * stride + k]) ^ 0x80;
    if (kCount == kBlock) return add_blocks<false>(x, tokens, w, kApart, n, sums);
    for (int64_t t = 0; t < tokens; ++t)
      products<kCount>(x.of + t * x.stride, w, kApart, n, sums + t * kOutputs);
  }

 private:
  template <bool kSigned>
  static void add_blocks(const Codes& x, int64_t tokens, const void* w, int64_t stride, int64_t n,
                         int32_t* sums) {
    const auto add = [&](auto count, auto fetch, int64_t t) {
      add_block<count.value, kSigned, fetch.value>(x.of + t * x.stride, x.stride, w, stride, n,
                                                   sums + t * kOutputs, kOutputs);
      return t + count.value;
    };
    int64_t t = 0;
    if (kSigned)  // the first pass over q waits for memory
      t = tokens < kBlock ? add(Constant<1>(), Constant<1>(), 0)
                          : add(Constant<kBlock>(), Constant<1>(), 0);
    while (t + kBlock <= tokens) t = add(Constant<kBlock>(), Constant<0>(), t);
    while (t < tokens) t = add(Constant<1>(), Constant<0>(), t);
  }
};
#else
using Products = Widened;
#endif

int64_t tokens_of_task(const Linear& l) {
  return smaller(smaller(Products::kMost / smaller(l.depth, kDepth), kTokens), l.tokens);
}

int64_t linear_tasks(const Linear& l) {
  return divided_up(l.tokens, tokens_of_task(l)) * divided_up(l.outputs, kOutputs);
}

// The sums of rows [first, first + tokens) of x by rows [row, row + rows) of q.
void sums_of(const Linear& l, int64_t first, int64_t tokens, int64_t row, int64_t rows,
             int32_t* sums) {
  for (int64_t i = 0; i < tokens * kOutputs; ++i) sums[i] = 0;
  for (int64_t from = 0; from < l.depth; from += kDepth) {
    const int64_t n = smaller(kDepth, l.depth - from);
    const Products::Codes x(l.x + first * l.depth + from, l.depth, tokens, n);
    int32_t unwanted[kTokens] = {};
    Products::unwanted(x, tokens, n, unwanted);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < kOutputs; ++i) sums[t * kOutputs + i] -= unwanted[t];
    const int8_t* const q = l.q + row * l.depth + from;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      Products::add<kRows>(x, tokens, q + i * l.depth, l.depth, n, sums + i);
    for (; i < rows; ++i) Products::add<1>(x, tokens, q + i * l.depth, l.depth, n, sums + i);
  }
}

template <class Y>
void scale_row(const int32_t* __restrict sums, float x_scale, const float* __restrict scale,
               const float* __restrict bias, Y* __restrict y, int64_t n) {
  if (bias != nullptr)
    for (int64_t i = 0; i < n; ++i)
      y[i] = narrow<Y>(Wide<Y>(scaled_sum(sums[i], x_scale, scale[i]) + bias[i]));
  else
    for (int64_t i = 0; i < n; ++i)
      y[i] = narrow<Y>(Wide<Y>(scaled_sum(sums[i], x_scale, scale[i])));
}

void linear(const Linear& l, int64_t begin, int64_t end) {
  const int64_t most = tokens_of_task(l), blocks = divided_up(l.tokens, most);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % blocks * most, row = task / blocks * kOutputs;
    const int64_t tokens = smaller(most, l.tokens - first),
                  rows = smaller(kOutputs, l.outputs - row);
    int32_t sums[kTokens * kOutputs];
    sums_of(l, first, tokens, row, rows, sums);
    float scale[kOutputs];
    for (int64_t i = 0; i < rows; ++i) scale[i] = l.scale[l.each_scale ? row + i : 0];
    with_float(l.y_type, [&](auto tag) {
      using Y = typename decltype(tag)::type;
      for (int64_t t = 0; t < tokens; ++t)
        scale_row(sums + t * kOutputs, l.x_scale[first + t], scale,
                  l.bias == nullptr ? nullptr : l.bias + row,
                  static_cast<Y*>(l.y) + (first + t) * l.outputs + row, rows);
    });
  }
}

}  // namespace
}  // namespace quantkit

#define QUANTKIT_EXPORT_LINEAR(isa)                        \
  namespace quantkit {                                     \
  extern const LinearTable isa##_linear;                   \
  const LinearTable isa##_linear = {linear_tasks, linear}; \
  }
