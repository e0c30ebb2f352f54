// From a layout to the contiguous elements that loops take: pieces of the innermost dimension in
// chunks, gathered, widened and narrowed where the data is not as a loop wants it, with the
// parameters that belong to each element.
#pragma once

#include "convert.h"
#include "rows.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace quantkit {
namespace {

struct Offsets {
  int64_t of[kOperands];

  explicit Offsets(const Layout& layout) {
    for (int o = 0; o < kOperands; ++o) of[o] = layout.offset[o];
  }
  void move(const Dim& dim, int64_t count) {
    for (int o = 0; o < kOperands; ++o) of[o] += dim.stride[o] * count;
  }
};

// Calls body(offsets, index in the innermost dimension, n) for each piece of it within [begin,
// end).
template <class Body>
void for_pieces(const Layout& layout, int64_t begin, int64_t end, Body body) {
  if (begin >= end) return;
  const Dim* dims = layout.dims;
  const int32_t count = layout.count;
  Offsets at(layout);
  int64_t index[kMaxDims];
  int64_t rest = begin;
  for (int32_t k = count - 1; k >= 0; --k) {
    index[k] = rest % dims[k].size;
    rest /= dims[k].size;
    at.move(dims[k], index[k]);
  }
  const Dim& inner = dims[count - 1];
  int64_t first = index[count - 1];
  for (;;) {
    const int64_t n = smaller(inner.size - first, end - begin);
    body(at, first, n);
    begin += n;
    if (begin == end) return;  // always here where there is one dimension
    at.move(inner, -first);
    first = 0;
    int32_t k = count - 2;
    for (; ++index[k] == dims[k].size; --k) {
      at.move(dims[k], 1 - dims[k].size);
      index[k] = 0;
    }
    at.move(dims[k], 1);
  }
}

template <class Bits>
void copy_steps(const void* from_, int64_t from_step, void* to_, int64_t to_step, int64_t n) {
  const Any<Bits>* __restrict from = static_cast<const Any<Bits>*>(from_);
  Any<Bits>* __restrict to = static_cast<Any<Bits>*>(to_);
  if (from_step == 1)
    for (int64_t i = 0; i < n; ++i) to[i * to_step] = from[i];
  else if (to_step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * from_step];
  else
    for (int64_t i = 0; i < n; ++i) to[i * to_step] = from[i * from_step];
}
void copy_steps(int64_t size, const void* from, int64_t from_step, void* to, int64_t to_step,
                int64_t n) {
  switch (size) {
    case 1: return copy_steps<int8_t>(from, from_step, to, to_step, n);
    case 2: return copy_steps<int16_t>(from, from_step, to, to_step, n);
    case 4: return copy_steps<int32_t>(from, from_step, to, to_step, n);
    default: return copy_steps<int64_t>(from, from_step, to, to_step, n);
  }
}

constexpr int64_t kFill = 16;  // elements that one store may write, beyond the last too
struct alignas(64) Buffer {
  unsigned char bytes[(kChunk + kFill) * 8];
};

// A chunk of a tensor to read: in place where it is contiguous, else gathered; converted where a
// loop takes another type.
struct Reader {
  const char* base;
  int64_t size;
  Convert convert;     // null: none
  int64_t packed = 1;  // elements a byte
  Buffer gathered, converted;

  Reader(const void* data, int64_t size_)
      : base(static_cast<const char*>(data)), size(size_), convert(nullptr) {}
  Reader(const void* data, Type type, Type taken)
      : base(static_cast<const char*>(data)),
        size(size_of(type)),
        convert(type == taken ? nullptr : convert_of(type, taken)) {}

  // Codes, each in bytes of its own.
  Reader(const void* data, Format format, bool packed_) : Reader(data, size_of(format)) {
    if (!packed_) return;
    convert = unpack_of(format);
    packed = per_byte(format);
  }

  const void* get(int64_t offset, int64_t step, int64_t n) {
    if (packed > 1) return unpacked(offset, step, n);
    const void* from = base + offset * size;
    if (step != 1 && n != 1) {
      copy_steps(size, from, step, gathered.bytes, 1, n);
      from = gathered.bytes;
    }
    if (convert == nullptr) return from;
    convert(from, converted.bytes, n);
    return converted.bytes;
  }

 private:
  const void* unpacked(int64_t offset, int64_t step, int64_t n) {
    if (step == 1 || n == 1) {
      const int64_t begin = offset % packed, count = (begin + n + packed - 1) / packed * packed;
      convert(base + offset / packed, converted.bytes, count);
      return converted.bytes + begin;
    }
    for (int64_t i = 0; i < n; ++i, offset += step) {  // as of a short block of one element
      convert(base + offset / packed, gathered.bytes, packed);
      converted.bytes[i] = gathered.bytes[offset % packed];
    }
    return converted.bytes;
  }
};

#ifdef __SSE2__
// Past the caches: lines that are written whole need not be read first. Half a line would cost as
// much as many whole ones, so the ends are written as usual.
void copy_nontemporal(char* __restrict to, const unsigned char* __restrict from, int64_t bytes) {
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
void finish_nontemporal() { _mm_sfence(); }
constexpr bool kHasNontemporal = true;
#else
void copy_nontemporal(char* to, const unsigned char* from, int64_t bytes) {
  memcpy(to, from, bytes);
}
void finish_nontemporal() {}
constexpr bool kHasNontemporal = false;
#endif

// A chunk of a tensor to write: directly where it is contiguous, else through buffers by put():
// where a loop makes another type, where it must be apart from what is read, past the caches.
struct Writer {
  char* base;
  int64_t size;
  bool nontemporal, apart;
  Convert convert;     // null: none
  int64_t packed = 1;  // elements a byte; a chunk of them is contiguous, and its bytes are whole
  Buffer made, converted;

  Writer(void* data, int64_t size_, bool nontemporal_)
      : base(static_cast<char*>(data)),
        size(size_),
        nontemporal(nontemporal_),
        apart(false),
        convert(nullptr) {}
  Writer(void* data, Type type, Type taken, bool nontemporal_, bool apart_)
      : base(static_cast<char*>(data)),
        size(size_of(type)),
        nontemporal(nontemporal_),
        apart(apart_),
        convert(type == taken ? nullptr : convert_of(taken, type)) {}
  Writer(void* data, Format format, bool packed_, bool nontemporal_)
      : Writer(data, size_of(format), nontemporal_) {
    if (!packed_) return;
    convert = pack_of(format);
    packed = per_byte(format);
  }
  ~Writer() {
    if (nontemporal) finish_nontemporal();
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  bool direct() const { return convert == nullptr && !nontemporal && !apart; }
  void* get(int64_t offset, int64_t step, int64_t n) {
    return direct() && (step == 1 || n == 1) ? base + offset * size
                                             : static_cast<void*>(made.bytes);
  }
  void put(int64_t offset, int64_t step, int64_t n) {
    if (packed > 1) return convert(made.bytes, base + offset / packed, n);
    char* const to = base + offset * size;
    const unsigned char* from = made.bytes;
    const bool in_one_piece = step == 1 || n == 1;
    if (convert != nullptr) {
      void* const target = in_one_piece && !nontemporal ? static_cast<void*>(to) : converted.bytes;
      convert(from, target, n);
      if (target == to) return;
      from = converted.bytes;
    }
    if (nontemporal) return copy_nontemporal(to, from, n * size);
    if (!in_one_piece) return copy_steps(size, from, 1, to, step, n);
    if (apart) memcpy(to, from, n * size);
  }
};

// How a parameter changes along the innermost dimension: element j uses
// j / inner * outer_step + j % inner * inner_step.
struct Pattern {
  int64_t inner = 1, outer_step = 0, inner_step = 0;
};

// A parameter as the wide values that a step of dtype `step` takes: one, or one for each element. A
// zero point is rounded to that dtype first, a scale is taken in full.
struct Values {
  Parameter parameter;
  Pattern pattern;
  Type step;
  bool round, as_is;
  int64_t offset = -1, first = 0, filled = 0;  // what the buffer holds
  Buffer buffer;

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
    return buffer.bytes;
  }

  template <class D>
  void fill(int64_t base, int64_t from, int64_t n) {
    with_float(parameter.type, [&](auto tag) {
      using P = typename decltype(tag)::type;
      const P* p = static_cast<const P*>(parameter.data) + base;
      Wide<D>* out = reinterpret_cast<Wide<D>*>(buffer.bytes);
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
          for (int64_t j = 0; j < count; j += kFill)
            for (int64_t k = 0; k < kFill; ++k) out[i + j + k] = shared;
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

// Rows of n elements each: offsets and steps of the data, base offsets of the parameters and the
// position in their patterns.
struct Chunk {
  int64_t x, q, y, x_step, q_step, y_step, scale, zero_point, index, index_step, first, rows, n;

  int64_t elements() const { return rows * n; }
};

// Rows below these sizes are joined with the dimension around them where the data allows. A call of
// a loop would cost more than the row: very short ones get their parameters spread out in a buffer,
// others are given to a loop many at a time. Way back from float formats: shorter ones.
constexpr int64_t kShortRow = 32, kShortRowBack = 16, kManyRows = 1024, kShortColumns = 256;

// The operands that step from element to element, which a chunk has in one piece.
constexpr int kOfElements[] = {kX, kQ, kY, kIndex};

// How a layout is cut into chunks.
struct Chunks {
  Layout layout;
  Pattern scale, zero_point;
  int64_t row = 0;  // elements under one set of parameters, where a chunk takes several such rows
  bool each;        // every element has its own
  bool contiguous = true;

  // many_rows: rows from this size on are not joined. short_row: below this size parameters are
  // spread out. spread: they always are.
  Chunks(const Layout& given, int64_t many_rows, int64_t short_row, bool spread) : layout(given) {
    Dim* inner = &layout.dims[layout.count - 1];
    const int64_t size = inner->size;
    scale = {size, 0, inner->stride[kScale]};
    zero_point = {size, 0, inner->stride[kZeroPoint]};
    const bool own = scale.inner_step != 0 || zero_point.inner_step != 0;
    each = own || spread;
    if (layout.count > 1 && size < (own ? kShortColumns : many_rows) && joins(inner[-1], *inner)) {
      Dim* outer = inner - 1;
      const int64_t steps[] = {outer->stride[kScale], outer->stride[kZeroPoint]};
      if (!each && size >= short_row) {
        row = size;
        scale = {outer->size, 0, steps[0]};
        zero_point = {outer->size, 0, steps[1]};
      } else {
        scale.outer_step = steps[0];
        zero_point.outer_step = steps[1];
        each = true;
      }
      outer->size *= size;
      for (const int o : kOfElements) outer->stride[o] = inner->stride[o];
      inner = outer;
      --layout.count;
    }
    inner->stride[kScale] = inner->stride[kZeroPoint] = 0;
    for (int o = kX; o <= kY; ++o) contiguous &= inner->stride[o] == 1;
  }

  static bool joins(const Dim& outer, const Dim& inner) {
    bool joins = true;
    for (const int o : kOfElements) joins &= outer.continues(inner, o);
    return joins;
  }

  // How many values of each parameter a chunk takes.
  int64_t values(const Chunk& c) const { return each ? c.n : c.rows; }

  // body(chunk) over [begin, end); whole: no chunk needs to fit in a buffer.
  template <class Body>
  void run(int64_t begin, int64_t end, bool whole, Body body) const {
    const int64_t* step = layout.dims[layout.count - 1].stride;
    const int64_t unit = row != 0 ? row : each ? scale.inner : 1;
    // A multiple of the unit where it can be: the next finds its parameters in the buffer.
    int64_t chunk;
    if (whole && !each)
      chunk = row != 0 ? kChunk * row : INT64_MAX;
    else
      chunk = kChunk < unit ? kChunk : kChunk / unit * unit;
    for_pieces(layout, begin, end, [&](const Offsets& at, int64_t first, int64_t n) {
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
                   at.of[kZeroPoint], at.of[kIndex] + done * step[kIndex], step[kIndex], index,
                   rows, m});
        done += rows * m;
      }
    });
  }
};

}  // namespace
}  // namespace quantkit
