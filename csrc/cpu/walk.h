// The walk over levels that feeds the loops, untyped: pieces of the innermost level in chunks, gathered
// where the data is not contiguous, with the parameters that belong to each element.
#pragma once

#include "loops.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace quantkit {
namespace {

struct Offsets {
  int64_t of[kOperands] = {};

  void move(const Level& level, int64_t count) {
    for (int k = 0; k < kOperands; ++k) of[k] += level.step[k] * count;
  }
};

// Calls body(offsets, index in the innermost level, n) for each piece of it within [begin, end).
template <class Body>
void walk(const Level* levels, int32_t count, int64_t begin, int64_t end, Body body) {
  if (begin >= end) return;
  Offsets at;
  int64_t index[kMaxLevels];
  int64_t rest = begin;
  for (int32_t k = count - 1; k >= 0; --k) {
    index[k] = rest % levels[k].size;
    rest /= levels[k].size;
    at.move(levels[k], index[k]);
  }
  const Level& inner = levels[count - 1];
  int64_t first = index[count - 1];
  for (;;) {
    const int64_t n = smaller(inner.size - first, end - begin);
    body(at, first, n);
    begin += n;
    if (begin == end) return;  // always here where there is one level
    at.move(inner, -first);
    first = 0;
    int32_t k = count - 2;
    for (; ++index[k] == levels[k].size; --k) {
      at.move(levels[k], 1 - levels[k].size);
      index[k] = 0;
    }
    at.move(levels[k], 1);
  }
}

template <class Bits>
void copy_steps(const void* from, int64_t from_step, void* to, int64_t to_step, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    static_cast<Bits*>(to)[i * to_step] = static_cast<const Bits*>(from)[i * from_step];
}
void copy_steps(int64_t size, const void* from, int64_t from_step, void* to, int64_t to_step, int64_t n) {
  switch (size) {
    case 1: return copy_steps<int8_t>(from, from_step, to, to_step, n);
    case 2: return copy_steps<int16_t>(from, from_step, to, to_step, n);
    case 4: return copy_steps<int32_t>(from, from_step, to, to_step, n);
    default: return copy_steps<int64_t>(from, from_step, to, to_step, n);
  }
}

struct alignas(64) Scratch {
  unsigned char bytes[kChunk * 8];
};

// A chunk of a tensor to read: in place where it is contiguous, else gathered; widened from float16 to float
// where that is asked for.
struct Reader {
  const char* base;
  int64_t size;
  bool widens;
  Scratch scratch, wide;

  Reader(const void* data, Type type, bool widens_ = false)
      : base(static_cast<const char*>(data)), size(size_of(type)), widens(widens_) {}
  const void* get(int64_t offset, int64_t step, int64_t n) {
    const void* from = base + offset * size;
    if (step != 1 && n != 1) {
      copy_steps(size, from, step, scratch.bytes, 1, n);
      from = scratch.bytes;
    }
    if (!widens) return from;
    convert_run<f16, float>(from, wide.bytes, n);
    return wide.bytes;
  }
};

#ifdef __SSE2__
// Past the caches: lines that are written whole need not be read first. Half a line would cost as much as
// many whole ones, so the ends are written as usual.
void stream(char* __restrict to, const unsigned char* __restrict from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t head = smaller(bytes, -reinterpret_cast<intptr_t>(to) & (kLine - 1));
  memcpy(to, from, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine)
    for (int64_t k = 0; k < kLine; k += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + k)));
  memcpy(to + i, from + i, bytes - i);
}
void finish_streams() { _mm_sfence(); }
constexpr bool kStreams = true;
#else
void stream(char* to, const unsigned char* from, int64_t bytes) { memcpy(to, from, bytes); }
void finish_streams() {}
constexpr bool kStreams = false;
#endif

// A chunk of a tensor to write: directly where it is contiguous, else (or where it must be apart from what is
// read) through scratch by put(), or streamed.
struct Writer {
  char* base;
  int64_t size;
  bool streams, apart;
  Scratch scratch;

  Writer(void* data, Type type, bool streams_, bool apart_ = false)
      : base(static_cast<char*>(data)), size(size_of(type)), streams(streams_), apart(apart_) {}
  ~Writer() {
    if (streams) finish_streams();
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void* get(int64_t offset, int64_t step, int64_t n) {
    if (!streams && !apart && (step == 1 || n == 1)) return base + offset * size;
    return scratch.bytes;
  }
  void put(int64_t offset, int64_t step, int64_t n) {
    if (streams) return stream(base + offset * size, scratch.bytes, n * size);
    if (step != 1 && n != 1) return copy_steps(size, scratch.bytes, 1, base + offset * size, step, n);
    if (apart) memcpy(base + offset * size, scratch.bytes, n * size);
  }
};

// How a parameter changes along the innermost level: element j uses
// j / inner * outer_step + j % inner * inner_step.
struct Pattern {
  int64_t inner = 1, outer_step = 0, inner_step = 0;
};

// A parameter as the wide values that a step of type `step` takes: one, or one for each element.
// A zero point is rounded to that type first, a scale is taken in full.
struct Values {
  Parameter parameter;
  Pattern pattern;
  Type step;
  bool round, as_is;
  int64_t offset = -1, first = 0, filled = 0;  // what scratch holds
  Scratch scratch;

  Values(const Parameter& p, const Pattern& pattern_, Type step_, bool round_)
      : parameter(p), pattern(pattern_), step(step_), round(round_) {
    as_is = step == Type::f64   ? p.type == Type::f64
            : step == Type::f32 ? p.type == Type::f32
                                : p.type == Type::f32 && !round;
  }

  const void* get(int64_t base, int64_t from, int64_t n) {
    if (pattern.outer_step == 0 && pattern.inner_step == 0) from = 0;
    const int64_t column = from == 0 ? 0 : from % pattern.inner;  // divisions are slow
    if (as_is && (n == 1 || (pattern.inner_step == 1 && column + n <= pattern.inner))) {
      const int64_t row = from == 0 ? 0 : from / pattern.inner;
      const int64_t at = base + row * pattern.outer_step + column * pattern.inner_step;
      return static_cast<const char*>(parameter.data) + at * size_of(parameter.type);
    }
    const int64_t start = pattern.outer_step == 0 ? column : from;
    if (offset != base || first != start || filled < n) {
      with_float(step, [&](auto tag) { fill<typename decltype(tag)::type>(base, from, n); });
      offset = base, first = start, filled = n;
    }
    return scratch.bytes;
  }

  template <class D>
  void fill(int64_t base, int64_t from, int64_t n) {
    with_float(parameter.type, [&](auto tag) {
      using P = typename decltype(tag)::type;
      const P* p = static_cast<const P*>(parameter.data) + base;
      Wide<D>* out = reinterpret_cast<Wide<D>*>(scratch.bytes);
      if (n == 1 && from == 0) {
        *out = value<D>(*p);
        return;
      }
      int64_t row = from / pattern.inner, column = from % pattern.inner;
      for (int64_t i = 0; i < n; ++row, column = 0) {
        const int64_t count = smaller(pattern.inner - column, n - i);
        const P* at = p + row * pattern.outer_step + column * pattern.inner_step;
        if (pattern.inner_step == 0) {
          const Wide<D> shared = value<D>(*at);
          for (int64_t j = 0; j < count; ++j) out[i + j] = shared;
        } else {
          for (int64_t j = 0; j < count; ++j) out[i + j] = value<D>(at[j * pattern.inner_step]);
        }
        i += count;
      }
    });
  }

  template <class D, class P>
  Wide<D> value(P p) const {
    const Wide<D> v = static_cast<Wide<D>>(widen(p));
    return round ? rounded<D>(v) : v;
  }
};

// A stretch of elements under the innermost level, rows of n: offsets and steps of the data, base offsets
// of the parameters and the position in their patterns.
struct Chunk {
  int64_t x, q, y, xs, qs, ys, scale, zero_point, first, rows, n;

  int64_t elements() const { return rows * n; }
};

// Rows below these sizes are joined with the level around them where the data allows. A call of a loop
// would cost more than the row: very short ones get their parameters spread out in scratch, others are
// given to a loop many at a time.
constexpr int64_t kShortRun = 32, kManyRows = 1024, kShortRow = 256;

// The levels prepared for walking: the innermost one's parameters are left to patterns.
struct Plan {
  Level levels[kMaxLevels];
  int32_t count;
  Pattern scale, zero_point;
  int64_t row = 0;  // elements under one set of parameters, where a chunk takes several such rows
  bool each, contiguous;

  explicit Plan(const Shape& shape, int64_t many_rows = kManyRows)
      : count(shape.count), each(false), contiguous(true) {
    for (int32_t k = 0; k < count; ++k) levels[k] = shape.levels[k];
    Level* inner = &levels[count - 1];
    const int64_t size = inner->size;
    scale = {size, 0, inner->step[kScale]};
    zero_point = {size, 0, inner->step[kZeroPoint]};
    each = scale.inner_step != 0 || zero_point.inner_step != 0;
    if (count > 1 && size < (each ? kShortRow : many_rows) && joins(levels[count - 2], *inner)) {
      Level* outer = inner - 1;
      const int64_t steps[] = {outer->step[kScale], outer->step[kZeroPoint]};
      if (!each && size >= kShortRun) {
        row = size;
        scale = {outer->size, 0, steps[0]};
        zero_point = {outer->size, 0, steps[1]};
      } else {
        scale.outer_step = steps[0];
        zero_point.outer_step = steps[1];
        each = true;
      }
      outer->size *= size;
      for (int k = kX; k <= kY; ++k) outer->step[k] = inner->step[k];
      inner = outer;
      --count;
    }
    inner->step[kScale] = inner->step[kZeroPoint] = 0;
    for (int k = kX; k <= kY; ++k) contiguous &= inner->step[k] == 1;
  }

  static bool joins(const Level& outer, const Level& inner) {
    bool joins = true;
    for (int k = kX; k <= kY; ++k) joins &= outer.step[k] == inner.size * inner.step[k];
    return joins;
  }

  // body(chunk) over [begin, end); whole: no chunk needs to fit in scratch.
  template <class Body>
  void run(int64_t begin, int64_t end, bool whole, Body body) const {
    const int64_t* step = levels[count - 1].step;
    const int64_t unit = row != 0 ? row : each ? scale.inner : 1;
    int64_t chunk;  // a multiple of the unit where it can be: the next finds its parameters in scratch
    if (whole && !each)
      chunk = row != 0 ? kChunk * row : INT64_MAX;
    else
      chunk = kChunk < unit ? kChunk : kChunk / unit * unit;
    walk(levels, count, begin, end, [&](const Offsets& at, int64_t first, int64_t n) {
      for (int64_t done = 0; done < n;) {
        const int64_t from = first + done;
        int64_t m = smaller(n - done, chunk - from % chunk);
        int64_t rows = 1, index = from;
        if (row != 0) {
          index = from / row;
          const int64_t column = from % row;
          if (column != 0 || m < row) {
            m = smaller(m, row - column);
          } else {
            rows = m / row;
            m = row;
          }
        }
        body(Chunk{at.of[kX] + done * step[kX], at.of[kQ] + done * step[kQ],
                   at.of[kY] + done * step[kY], step[kX], step[kQ], step[kY], at.of[kScale],
                   at.of[kZeroPoint], index, rows, m});
        done += rows * m;
      }
    });
  }
};

}  // namespace
}  // namespace quantkit
