// Extremes of contiguous elements, as integer keys, and the parameters that follow from them.
#pragma once

#include "../numerics/reductions.h"
#include "convert.h"

namespace quantkit {
namespace {

// Contiguous elements: rows of n for a state each, `outer` apart (columns = 0), or n elements, of
// which the first is in column `first` of so many, each column with a state.
struct Reduce {
  const void* x;
  void* keys;
  int64_t state, count;  // the first state, and the length of each array of keys
  int64_t rows, outer, n, columns, first;
};

template <class X, class R>
struct Reduction {
  using Key = typename R::Bits;
  static constexpr bool kTwo = R::kKeys > 1;
  static constexpr int64_t kPeriod = 256;  // of few columns, as many as make about so many

  static void rows(const Reduce& r) {
    const X* __restrict x = static_cast<const X*>(r.x);
    Key* __restrict keys0 = static_cast<Key*>(r.keys) + r.state;
    Key* __restrict keys1 = keys0 + (kTwo ? r.count : 0);
    if (r.columns == 0) {
      for (int64_t row = 0; row < r.rows; ++row, x += r.n, keys0 += r.outer, keys1 += r.outer) {
        Key a = *keys0, b = *keys1;
        for (int64_t i = 0; i < r.n; ++i) {
          a = R::template join<0>(a, R::template take<0>(x[i]));
          if constexpr (kTwo) b = R::template join<1>(b, R::template take<1>(x[i]));
        }
        *keys0 = a;
        if constexpr (kTwo) *keys1 = b;
      }
    } else if (r.first + r.n <= r.columns) {
      over(x, keys0 + r.first, keys1 + r.first, r.n);
    } else {
      periods(x, keys0, keys1, r.columns, r.first, r.n);
    }
  }

  // n columns of kRows rows that lie one after the other.
  template <int kRows = 1>
  static void over(const X* __restrict x, Key* __restrict keys0, Key* __restrict keys1, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      Key a = R::template take<0>(x[i]), b = R::template take<1>(x[i]);
      for (int row = 1; row < kRows; ++row) {
        a = R::template join<0>(a, R::template take<0>(x[i + row * n]));
        if constexpr (kTwo) b = R::template join<1>(b, R::template take<1>(x[i + row * n]));
      }
      keys0[i] = R::template join<0>(keys0[i], a);
      if constexpr (kTwo) keys1[i] = R::template join<1>(keys1[i], b);
    }
  }

  static void periods(const X* x, Key* keys0, Key* keys1, int64_t columns, int64_t first,
                      int64_t n) {
    if (first != 0) {
      const int64_t head = columns - first;
      over(x, keys0 + first, keys1 + first, head);
      x += head, n -= head;
    }
    const int64_t period = columns < kPeriod ? kPeriod / columns * columns : columns;
    if (columns < kPeriod && n >= 4 * period) {
      Key many[R::kKeys][kPeriod];
      Key *const many0 = many[0], *const many1 = many[R::kKeys - 1];
      for (int64_t i = 0; i < period; ++i) {
        many0[i] = R::template first<0>();
        if constexpr (kTwo) many1[i] = R::template first<1>();
      }
      for (; n >= 4 * period; x += 4 * period, n -= 4 * period) over<4>(x, many0, many1, period);
      for (int64_t i = 0; i < period; i += columns)
        for (int64_t c = 0; c < columns; ++c) {
          keys0[c] = R::template join<0>(keys0[c], many0[i + c]);
          if constexpr (kTwo) keys1[c] = R::template join<1>(keys1[c], many1[i + c]);
        }
    }
    for (; n > 0; x += columns, n -= columns) over(x, keys0, keys1, smaller(n, columns));
  }

  static void first(void* keys_, int64_t count) {
    Key* __restrict keys = static_cast<Key*>(keys_);
    for (int64_t i = 0; i < count; ++i) keys[i] = R::template first<0>();
    for (int64_t i = count; kTwo && i < 2 * count; ++i) keys[i] = R::template first<1>();
  }

  static void join(void* to_, const void* from_, int64_t count) {
    Key* __restrict to = static_cast<Key*>(to_);
    const Key* __restrict from = static_cast<const Key*>(from_);
    for (int64_t i = 0; i < count; ++i) to[i] = R::template join<0>(to[i], from[i]);
    for (int64_t i = count; kTwo && i < 2 * count; ++i) to[i] = R::template join<1>(to[i], from[i]);
  }
};

// Parameters `step` elements apart, from n states.
struct Finalize {
  const void* keys;
  int64_t state, count;
  void *scale, *zero_point;
  int64_t scale_step, zero_point_step, n;
  void* stored;         // beside scale, with its step
  const float* global;  // as well, where there is one for each scale; else one
  bool each_global;
};

// Of n symmetric scales that are stored as others than the steps use, `step` apart; used: null where
// no step is taken.
template <class How, int64_t kStep>
void store_scales(const float* __restrict max_abs, Any<typename How::Bits>* __restrict stored,
                  float* __restrict used, const float* __restrict global, bool each_global,
                  int64_t step, int64_t n, const Scheme& given) {
  const Scheme scheme = given;
  if constexpr (kStep != 0) step = kStep;
  const float global0 = *global;
  const auto store = [&](int64_t i, float divisor) {
    const StoredScale made = How::of(max_abs[i], divisor, scheme);
    stored[i * step] = static_cast<typename How::Bits>(made.bits);
    return made.used;
  };
  if (each_global)
    for (int64_t i = 0; i < n; ++i) {
      const float scale = store(i, global[i * step]);
      if (used != nullptr) used[i * step] = scale;
    }
  else if (used == nullptr)
    for (int64_t i = 0; i < n; ++i) store(i, global0);
  else
    for (int64_t i = 0; i < n; ++i) used[i * step] = store(i, global0);
}
template <class X>
void finalize_stored_row(const Finalize& f, const Scheme& scheme) {
  using R = AbsMax<X>;
  const typename R::Bits* __restrict keys = static_cast<const typename R::Bits*>(f.keys) + f.state;
  float max_abs[kChunk];
  for (int64_t begin = 0; begin < f.n; begin += kChunk) {
    const int64_t n = smaller(kChunk, f.n - begin), at = begin * f.scale_step;
    for (int64_t i = 0; i < n; ++i) max_abs[i] = R::template extreme<float>(keys + begin + i);
    with_stored(scheme, [&](auto tag) {
      using How = typename decltype(tag)::type;
      const auto store = f.scale_step == 1 ? store_scales<How, 1> : store_scales<How, 0>;
      store(max_abs, static_cast<Any<typename How::Bits>*>(f.stored) + at,
            f.scale == nullptr ? nullptr : static_cast<float*>(f.scale) + at,
            f.global + (f.each_global ? at : 0), f.each_global, f.scale_step, n, scheme);
    });
  }
}

template <class X, class P, class R, bool kDense>
void finalize_row(const Finalize& f, const Scheme& given) {
  using Key = typename R::Bits;
  const Scheme scheme = given;
  const Key* __restrict keys = static_cast<const Key*>(f.keys) + f.state;
  P* __restrict scale = static_cast<P*>(f.scale);
  P* __restrict zero_point = static_cast<P*>(f.zero_point);
  for (int64_t i = 0; i < f.n; ++i) {
    Key own[R::kKeys];
    for (int k = 0; k < R::kKeys; ++k) own[k] = keys[i + k * f.count];
    P chosen_zero_point;
    R::finalize(own, scheme, scale[kDense ? i : i * f.scale_step], chosen_zero_point);
    if (zero_point != nullptr) zero_point[kDense ? i : i * f.zero_point_step] = chosen_zero_point;
  }
}

}  // namespace
}  // namespace quantkit
