// The loops, written once as plain C++ that the compiler vectorises for the including file's
// instruction set. First the innermost loops: typed, branch-free, each over one contiguous run. Then
// the walk over levels that feeds them, untyped. All of it has internal linkage but the one table.
//
// What keeps a loop vectorised: __restrict, ternaries, integer keys for extrema, no libm.
#pragma once

#include "../kernels.h"

namespace quantkit {
namespace {

constexpr int64_t kChunk = 1024;  // elements of a scratch buffer; a few of them fit in L1

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- innermost loops ------------------------------------------------------------------------------

using QuantizeRun = void (*)(const void* x, void* out, const void* scale, const void* zero_point,
                             int64_t n, int32_t q_min, int32_t q_max);

// kEach: every element has its own parameters. Out: the code's type, or bool for "in range".
template <class X, class D1, class D2, class Out, bool kEach>
void quantize_run(const void* x_, void* out_, const void* scale_, const void* zero_point_, int64_t n,
                  int32_t q_min_, int32_t q_max_) {
  const X* __restrict x = static_cast<const X*>(x_);
  Out* __restrict out = static_cast<Out*>(out_);
  const Wide<D1>* __restrict scale = static_cast<const Wide<D1>*>(scale_);
  const Wide<D2>* __restrict zero_point = static_cast<const Wide<D2>*>(zero_point_);
  const Wide<D1> scale0 = scale[0];
  const Wide<D2> zero_point0 = zero_point[0];
  const Wide<D2> q_min = Wide<D2>(q_min_), q_max = Wide<D2>(q_max_);
  for (int64_t i = 0; i < n; ++i) {
    const Wide<D2> v = affine<D1, D2>(Wide<D1>(widen(x[i])), kEach ? scale[i] : scale0,
                                      kEach ? zero_point[i] : zero_point0);
    if constexpr (kSame<Out, bool>)
      out[i] = in_range(v, q_min, q_max);
    else
      out[i] = static_cast<Out>(code(v, q_min, q_max));
  }
}

using DequantizeRun = void (*)(const void* q, void* y, const void* scale, const void* zero_point,
                               int64_t n);

template <class Q, class E1, class E2, bool kEach>
void dequantize_run(const void* q_, void* y_, const void* scale_, const void* zero_point_, int64_t n) {
  const Q* __restrict q = static_cast<const Q*>(q_);
  E2* __restrict y = static_cast<E2*>(y_);
  const E2* __restrict scale = static_cast<const E2*>(scale_);
  const E1* __restrict zero_point = static_cast<const E1*>(zero_point_);
  const E2 scale0 = scale[0];
  const E1 zero_point0 = zero_point[0];
  for (int64_t i = 0; i < n; ++i)
    y[i] = dequantized<E1, E2>(static_cast<float>(q[i]), kEach ? zero_point[i] : zero_point0,
                               kEach ? scale[i] : scale0);
}

using ConvertRun = void (*)(const void* from, void* to, int64_t n);

// float64 reaches half precision through float32.
template <class From, class To>
void convert_run(const void* from_, void* to_, int64_t n) {
  const From* __restrict from = static_cast<const From*>(from_);
  To* __restrict to = static_cast<To*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(static_cast<Wide<To>>(widen(from[i])));
}

// to = keep ? from : 0, for any type of the size of Bits.
template <class Bits>
void select_run(const bool* __restrict keep, const void* from_, void* to_, int64_t n) {
  const Bits* __restrict from = static_cast<const Bits*>(from_);
  Bits* __restrict to = static_cast<Bits*>(to_);
  for (int64_t i = 0; i < n; ++i) to[i] = keep[i] ? from[i] : Bits(0);
}

// Keys of x joined into low and high: into one pair (step 0), or into one pair for each element.
using ReduceRun = void (*)(const void* x, void* low, void* high, int64_t step, int64_t n);

template <class K>
K larger_key(K a, K b) { return a > b ? a : b; }
template <class K>
K lesser_key(K a, K b) { return a < b ? a : b; }

template <class X, class P, bool kSymmetric>
void reduce_run(const void* x_, void* low_, void* high_, int64_t step, int64_t n) {
  using Key = typename Traits<X>::Bits;
  using Kept = typename Traits<P>::Bits;
  const X* __restrict x = static_cast<const X*>(x_);
  Kept* __restrict low = static_cast<Kept*>(low_);
  Kept* __restrict high = static_cast<Kept*>(high_);
  if (step == 0) {
    Key least = static_cast<Key>(low[0]), most = static_cast<Key>(high[0]);
    for (int64_t i = 0; i < n; ++i) {
      const Key key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
      most = larger_key(most, key);
      if (!kSymmetric) least = lesser_key(least, key);
    }
    high[0] = most;
    if (!kSymmetric) low[0] = least;
  } else if (step == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const Kept key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
      high[i] = larger_key(high[i], key);
      if (!kSymmetric) low[i] = lesser_key(low[i], key);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Kept key = kSymmetric ? magnitude_key(x[i]) : order_key(x[i]);
      high[i * step] = larger_key(high[i * step], key);
      if (!kSymmetric) low[i * step] = lesser_key(low[i * step], key);
    }
  }
}

// Before the first element: the least high key and the greatest low key of X.
using ClearRun = void (*)(void* low, void* high, int64_t step, int64_t n);

template <class X, class P>
void clear_run(void* low_, void* high_, int64_t step, int64_t n) {
  using Key = typename Traits<X>::Bits;
  using Kept = typename Traits<P>::Bits;
  for (int64_t i = 0; i < n; ++i) {
    static_cast<Kept*>(low_)[i * step] = kMagnitude<X>;
    static_cast<Kept*>(high_)[i * step] = static_cast<Key>(-kMagnitude<X> - 1);
  }
}

// What a reduction left in the memory of a parameter.
template <class Key, class P>
Key key_at(const P* p) {
  typename Traits<P>::Bits key;
  memcpy(&key, p, sizeof(key));
  return static_cast<Key>(key);
}

using FinishRun = void (*)(void* zero_point, void* scale, int64_t step, int64_t n, const Scheme&);

template <class X, class P>
void finish_run(void* zero_point_, void* scale_, int64_t step, int64_t n, const Scheme& scheme) {
  using Key = typename Traits<X>::Bits;
  P* scale = static_cast<P*>(scale_);
  P* zero_point = static_cast<P*>(zero_point_);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = k * step;
    const Key high = key_at<Key>(scale + i);
    if (scheme.symmetric) {
      const Wide<P> max_abs = static_cast<Wide<P>>(widen(bit_cast<X>(high)));
      scale[i] = narrow<P>(symmetric_scale<P>(max_abs, scheme));
      zero_point[i] = narrow<P>(0);
    } else {
      const Key low = key_at<Key>(zero_point + i);
      Wide<P> x_min = static_cast<Wide<P>>(widen(from_order_key<X>(low)));
      const Wide<P> x_max = static_cast<Wide<P>>(widen(from_order_key<X>(high)));
      const Wide<P> s = asymmetric_scale<P>(x_min, x_max, scheme);
      scale[i] = narrow<P>(s);
      zero_point[i] = narrow<P>(asymmetric_zero_point<P>(x_min, s, scheme));
    }
  }
}

// ---- choosing a loop ------------------------------------------------------------------------------

template <class T>
struct Tag {
  using type = T;
};

// Calls f with the tag of a floating type.
template <class F>
auto with_float(Type type, F f) {
  switch (type) {
    case Type::f16: return f(Tag<f16>());
    case Type::bf16: return f(Tag<bf16>());
    case Type::f64: return f(Tag<double>());
    default: return f(Tag<float>());
  }
}

// The steps' types that occur: D1 is x's or wider, D2 is D1 or wider.
template <class X, class Out, bool kEach>
QuantizeRun quantize_loop(Type d1, Type d2) {
  if constexpr (sizeof(X) == 2) {
    if (d1 != Type::f32 && d1 != Type::f64)
      return d2 == Type::f32   ? quantize_run<X, X, float, Out, kEach>
             : d2 == Type::f64 ? quantize_run<X, X, double, Out, kEach>
                               : quantize_run<X, X, X, Out, kEach>;
  }
  if constexpr (sizeof(X) <= 4) {
    if (d1 != Type::f64)
      return d2 == Type::f64 ? quantize_run<X, float, double, Out, kEach>
                             : quantize_run<X, float, float, Out, kEach>;
  }
  return quantize_run<X, double, double, Out, kEach>;
}

template <class Out>
QuantizeRun quantize_loop(const Elementwise& e, bool each) {
  return with_float(e.x_type, [&](auto x) -> QuantizeRun {
    using X = typename decltype(x)::type;
    return each ? quantize_loop<X, Out, true>(e.divide_type, e.add_type)
                : quantize_loop<X, Out, false>(e.divide_type, e.add_type);
  });
}

template <class Q, bool kEach>
DequantizeRun dequantize_loop(Type e1, Type e2) {
  return e1 == Type::f64   ? dequantize_run<Q, double, double, kEach>
         : e2 == Type::f64 ? dequantize_run<Q, float, double, kEach>
                           : dequantize_run<Q, float, float, kEach>;
}

template <bool kEach>
DequantizeRun dequantize_loop(Type q, Type e1, Type e2) {
  switch (q) {
    case Type::i8: return dequantize_loop<int8_t, kEach>(e1, e2);
    case Type::u8: return dequantize_loop<uint8_t, kEach>(e1, e2);
    case Type::i16: return dequantize_loop<int16_t, kEach>(e1, e2);
    default: return dequantize_loop<float, kEach>(e1, e2);
  }
}

DequantizeRun dequantize_loop(const Elementwise& e, Type q, bool each) {
  return each ? dequantize_loop<true>(q, e.subtract_type, e.scale_type)
              : dequantize_loop<false>(q, e.subtract_type, e.scale_type);
}

template <class To>
ConvertRun convert_loop(Type from) {
  switch (from) {
    case Type::i8: return convert_run<int8_t, To>;
    case Type::u8: return convert_run<uint8_t, To>;
    case Type::i16: return convert_run<int16_t, To>;
    case Type::u16: return convert_run<uint16_t, To>;
    case Type::i32: return convert_run<int32_t, To>;
    case Type::u32: return convert_run<uint32_t, To>;
    case Type::i64: return convert_run<int64_t, To>;
    case Type::u64: return convert_run<uint64_t, To>;
    case Type::boolean: return convert_run<bool, To>;
    default:
      return with_float(from, [](auto x) -> ConvertRun {
        return convert_run<typename decltype(x)::type, To>;
      });
  }
}

ConvertRun convert_loop(Type from, Type to) {
  return with_float(to, [&](auto y) { return convert_loop<typename decltype(y)::type>(from); });
}

// Calls f with the tags of x's type and of the parameters': the same, or float for half precision.
template <class F>
auto with_dynamic_types(const Dynamic& d, F f) {
  return with_float(d.elements.x_type, [&](auto x) {
    if constexpr (sizeof(typename decltype(x)::type) == 2)
      if (d.p_type == Type::f32) return f(x, Tag<float>());
    return f(x, x);
  });
}

// ---- the walk over levels -------------------------------------------------------------------------

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

// A chunk of a tensor to read: in place where it is contiguous, else gathered.
struct Reader {
  const char* base;
  int64_t size;
  Scratch scratch;

  Reader(const void* data, Type type) : base(static_cast<const char*>(data)), size(size_of(type)) {}
  const void* get(int64_t offset, int64_t step, int64_t n) {
    const char* from = base + offset * size;
    if (step == 1 || n == 1) return from;
    copy_steps(size, from, step, scratch.bytes, 1, n);
    return scratch.bytes;
  }
};

// A chunk of a tensor to write: in place where it is contiguous, else scattered by put().
struct Writer {
  char* base;
  int64_t size;
  Scratch scratch;

  Writer(void* data, Type type) : base(static_cast<char*>(data)), size(size_of(type)) {}
  void* get(int64_t offset, int64_t step, int64_t n) {
    if (step == 1 || n == 1) return base + offset * size;
    return scratch.bytes;
  }
  void put(int64_t offset, int64_t step, int64_t n) {
    if (step != 1 && n != 1) copy_steps(size, scratch.bytes, 1, base + offset * size, step, n);
  }
};

template <class W>
W load(const Parameter& p, int64_t i) {
  switch (p.type) {
    case Type::f16: return static_cast<W>(widen(static_cast<const f16*>(p.data)[i]));
    case Type::bf16: return static_cast<W>(widen(static_cast<const bf16*>(p.data)[i]));
    case Type::f64: return static_cast<W>(static_cast<const double*>(p.data)[i]);
    default: return static_cast<W>(static_cast<const float*>(p.data)[i]);
  }
}

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
  bool round, direct;
  int64_t offset = -1, first = 0, filled = 0;  // what scratch holds
  Scratch scratch;

  Values(const Parameter& p, const Pattern& pattern_, Type step_, bool round_)
      : parameter(p), pattern(pattern_), step(step_), round(round_) {
    const bool as_is = step == Type::f64   ? p.type == Type::f64
                       : step == Type::f32 ? p.type == Type::f32
                                           : p.type == Type::f32 && !round;
    direct = as_is && pattern.inner_step == 1;
  }

  const void* get(int64_t base, int64_t from, int64_t n) {
    const int64_t column = from % pattern.inner;
    if (direct && column + n <= pattern.inner) {
      const int64_t at = base + from / pattern.inner * pattern.outer_step + column;
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
    Wide<D>* out = reinterpret_cast<Wide<D>*>(scratch.bytes);
    for (int64_t i = 0; i < n;) {
      const int64_t row = (from + i) / pattern.inner, column = (from + i) % pattern.inner;
      const int64_t count = smaller(pattern.inner - column, n - i);
      int64_t at = base + row * pattern.outer_step + column * pattern.inner_step;
      const Wide<D> shared = value<D>(at);
      for (int64_t j = 0; j < count; ++j, at += pattern.inner_step)
        out[i + j] = pattern.inner_step == 0 ? shared : value<D>(at);
      i += count;
    }
  }

  template <class D>
  Wide<D> value(int64_t at) const {
    const Wide<D> v = load<Wide<D>>(parameter, at);
    return round ? rounded<D>(v) : v;
  }
};

// A stretch of elements under the innermost level: offsets and steps of the data, base offsets of the
// parameters and the position in their patterns.
struct Chunk {
  int64_t x, q, y, xs, qs, ys, scale, zero_point, first, n;
};

// Rows below these sizes are joined with the level around them where the data allows, and their
// parameters spread out in scratch: a call of a loop would cost more than the row.
constexpr int64_t kShortRun = 32, kShortRow = 256;

// The levels prepared for walking: the innermost one's parameters are left to patterns.
struct Plan {
  Level levels[kMaxLevels];
  int32_t count;
  Pattern scale, zero_point;
  bool each, contiguous;

  explicit Plan(const Shape& shape) : count(shape.count), each(false), contiguous(true) {
    for (int32_t k = 0; k < count; ++k) levels[k] = shape.levels[k];
    Level* inner = &levels[count - 1];
    const int64_t size = inner->size;
    scale = {size, 0, inner->step[kScale]};
    zero_point = {size, 0, inner->step[kZeroPoint]};
    each = scale.inner_step != 0 || zero_point.inner_step != 0;
    if (count > 1 && size < (each ? kShortRow : kShortRun) && joins(levels[count - 2], *inner)) {
      Level* outer = inner - 1;
      scale.outer_step = outer->step[kScale];
      zero_point.outer_step = outer->step[kZeroPoint];
      outer->size *= size;
      for (int k = kX; k <= kY; ++k) outer->step[k] = inner->step[k];
      inner = outer;
      --count;
      each = each || scale.outer_step != 0 || zero_point.outer_step != 0;
    }
    inner->step[kScale] = inner->step[kZeroPoint] = 0;
    for (int k = kX; k <= kY; ++k) contiguous &= inner->step[k] == 1;
  }

  static bool joins(const Level& outer, const Level& inner) {
    bool joins = true;
    for (int k = kX; k <= kY; ++k) joins &= outer.step[k] == inner.size * inner.step[k];
    return joins;
  }

  // body(chunk) over [begin, end); whole: a chunk may be of any size.
  template <class Body>
  void run(int64_t begin, int64_t end, bool whole, Body body) const {
    const int64_t* step = levels[count - 1].step;
    // Chunks end where the pattern does, so that the next one finds its parameters in scratch.
    const int64_t rows = kChunk / scale.inner * scale.inner;
    const int64_t chunk = whole ? INT64_MAX : rows > 0 ? rows : kChunk;
    walk(levels, count, begin, end, [&](const Offsets& at, int64_t first, int64_t n) {
      for (int64_t done = 0; done < n;) {
        const int64_t m = smaller(n - done, chunk - (first + done) % chunk);
        body(Chunk{at.of[kX] + done * step[kX], at.of[kQ] + done * step[kQ],
                   at.of[kY] + done * step[kY], step[kX], step[kQ], step[kY], at.of[kScale],
                   at.of[kZeroPoint], first + done, m});
        done += m;
      }
    });
  }
};

// ---- the table's functions ------------------------------------------------------------------------

// The parameters of both directions, and how many values of each a chunk takes.
struct Given {
  Plan plan;
  Values divide, add, subtract, multiply;

  explicit Given(const Elementwise& e)
      : plan(e.shape),
        divide(e.scale, plan.scale, e.divide_type, false),
        add(e.add_zero_point, plan.zero_point, e.add_type, true),
        subtract(e.subtract_zero_point, plan.zero_point, e.subtract_type, false),
        multiply(e.scale, plan.scale, e.scale_type, false) {}

  int64_t values(const Chunk& c) const { return plan.each ? c.n : 1; }
  void quantize(QuantizeRun loop, const Elementwise& e, const Chunk& c, const void* x, void* out) {
    loop(x, out, divide.get(c.scale, c.first, values(c)), add.get(c.zero_point, c.first, values(c)),
         c.n, e.q_min, e.q_max);
  }
  void dequantize(DequantizeRun loop, const Chunk& c, const void* q, void* y) {
    loop(q, y, multiply.get(c.scale, c.first, values(c)),
         subtract.get(c.zero_point, c.first, values(c)), c.n);
  }
};

QuantizeRun code_loop(const Elementwise& e, Type code, bool each) {
  return code == Type::i16 ? quantize_loop<int16_t>(e, each) : quantize_loop<int8_t>(e, each);
}

void quantize(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e);
  const QuantizeRun loop = code_loop(e, e.q_type, given.plan.each);
  Reader x(e.x, e.x_type);
  Writer q(e.q, e.q_type);
  const bool whole = given.plan.contiguous && !given.plan.each;
  given.plan.run(begin, end, whole, [&](const Chunk& c) {
    given.quantize(loop, e, c, x.get(c.x, c.xs, c.n), q.get(c.q, c.qs, c.n));
    q.put(c.q, c.qs, c.n);
  });
}

void dequantize(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e);
  const DequantizeRun loop = dequantize_loop(e, e.q_type, given.plan.each);
  Reader q(e.q_in, e.q_type);
  Writer y(e.y, e.scale_type);
  const bool whole = given.plan.contiguous && !given.plan.each;
  given.plan.run(begin, end, whole, [&](const Chunk& c) {
    given.dequantize(loop, c, q.get(c.q, c.qs, c.n), y.get(c.y, c.ys, c.n));
    y.put(c.y, c.ys, c.n);
  });
}

void quantize_dequantize(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e);
  const QuantizeRun forth = code_loop(e, e.q_type, given.plan.each);
  const DequantizeRun back = dequantize_loop(e, e.q_type, given.plan.each);
  Reader x(e.x, e.x_type);
  Writer q(e.q, e.q_type), y(e.y, e.scale_type);
  given.plan.run(begin, end, false, [&](const Chunk& c) {
    void* codes = q.get(c.q, c.qs, c.n);
    given.quantize(forth, e, c, x.get(c.x, c.xs, c.n), codes);
    q.put(c.q, c.qs, c.n);
    given.dequantize(back, c, codes, y.get(c.y, c.ys, c.n));
    y.put(c.y, c.ys, c.n);
  });
}

void fake_quantize(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e);
  const QuantizeRun forth = code_loop(e, Type::i16, given.plan.each);
  const DequantizeRun back = dequantize_loop(e, Type::i16, given.plan.each);
  const ConvertRun convert = convert_loop(e.scale_type, e.y_type);
  Reader x(e.x, e.x_type);
  Writer y(e.y, e.y_type);
  Scratch codes, wide;
  given.plan.run(begin, end, false, [&](const Chunk& c) {
    given.quantize(forth, e, c, x.get(c.x, c.xs, c.n), codes.bytes);
    void* out = y.get(c.y, c.ys, c.n);
    if (e.y_type == e.scale_type) {
      given.dequantize(back, c, codes.bytes, out);
    } else {
      given.dequantize(back, c, codes.bytes, wide.bytes);
      convert(wide.bytes, out, c.n);
    }
    y.put(c.y, c.ys, c.n);
  });
}

void fake_quantize_backward(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e);
  const QuantizeRun loop = quantize_loop<bool>(e, given.plan.each);
  Reader x(e.x, e.x_type), grad(e.q_in, e.y_type);
  Writer y(e.y, e.y_type);
  bool inside[kChunk];
  given.plan.run(begin, end, false, [&](const Chunk& c) {
    given.quantize(loop, e, c, x.get(c.x, c.xs, c.n), inside);
    const void* from = grad.get(c.q, c.qs, c.n);
    void* to = y.get(c.y, c.ys, c.n);
    switch (size_of(e.y_type)) {
      case 2: select_run<int16_t>(inside, from, to, c.n); break;
      case 4: select_run<int32_t>(inside, from, to, c.n); break;
      default: select_run<int64_t>(inside, from, to, c.n);
    }
    y.put(c.y, c.ys, c.n);
  });
}

void convert(const Conversion& c, int64_t begin, int64_t end) {
  const ConvertRun loop = convert_loop(c.x_type, c.y_type);
  const Plan plan(c.shape);
  Reader x(c.x, c.x_type);
  Writer y(c.y, c.y_type);
  plan.run(begin, end, plan.contiguous, [&](const Chunk& k) {
    loop(x.get(k.x, k.xs, k.n), y.get(k.y, k.ys, k.n), k.n);
    y.put(k.y, k.ys, k.n);
  });
}

// Calls body(offset, step, n) for each run of parameters in [begin, end).
template <class Body>
void for_parameters(const Dynamic& d, int64_t begin, int64_t end, Body body) {
  const Shape& p = d.parameters;
  const int64_t step = p.levels[p.count - 1].step[kScale];
  walk(p.levels, p.count, begin, end, [&](const Offsets& at, int64_t, int64_t n) {
    body(at.of[kScale] * size_of(d.p_type), step, n);
  });
}

char* shifted(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

void clear_keys(const Dynamic& d, int64_t begin, int64_t end, void* low, void* high) {
  const ClearRun loop = with_dynamic_types(d, [](auto x, auto p) -> ClearRun {
    return clear_run<typename decltype(x)::type, typename decltype(p)::type>;
  });
  for_parameters(d, begin, end, [&](int64_t at, int64_t step, int64_t n) {
    loop(shifted(low, at), shifted(high, at), step, n);
  });
}

void reduce(const Dynamic& d, Part part, int64_t begin, int64_t end, void* low, void* high) {
  const ReduceRun loop = with_dynamic_types(d, [&](auto x, auto p) -> ReduceRun {
    using X = typename decltype(x)::type;
    using P = typename decltype(p)::type;
    return d.scheme.symmetric ? reduce_run<X, P, true> : reduce_run<X, P, false>;
  });
  const Shape& shape = d.elements.shape;
  Level levels[kMaxLevels];
  for (int32_t k = 0; k < shape.count; ++k) levels[k] = shape.levels[k];
  Offsets base;
  if (part.level >= 0) {
    base.move(levels[part.level], part.begin);
    levels[part.level].size = part.end - part.begin;
  }
  Reader x(d.elements.x, d.elements.x_type);
  const int64_t* step = levels[shape.count - 1].step;
  const int64_t p_size = size_of(d.p_type);
  walk(levels, shape.count, begin, end, [&](const Offsets& at, int64_t, int64_t n) {
    const int64_t whole = step[kX] == 1 ? n : kChunk;
    for (int64_t done = 0; done < n; done += whole) {
      const int64_t m = smaller(whole, n - done);
      const int64_t key = (base.of[kScale] + at.of[kScale] + done * step[kScale]) * p_size;
      const void* from = x.get(base.of[kX] + at.of[kX] + done * step[kX], step[kX], m);
      loop(from, shifted(low, key), shifted(high, key), step[kScale], m);
    }
  });
}

void join_keys(const Dynamic& d, const void* low_, const void* high_) {
  with_float(d.p_type, [&](auto tag) {
    using Key = typename Traits<typename decltype(tag)::type>::Bits;
    const Key *low = static_cast<const Key*>(low_), *high = static_cast<const Key*>(high_);
    Key *to_low = static_cast<Key*>(d.zero_point), *to_high = static_cast<Key*>(d.scale);
    for (int64_t i = 0; i < d.parameters.numel; ++i) {
      to_low[i] = lesser_key(to_low[i], low[i]);
      to_high[i] = larger_key(to_high[i], high[i]);
    }
  });
}

void finish(const Dynamic& d, int64_t begin, int64_t end) {
  const FinishRun loop = with_dynamic_types(d, [](auto x, auto p) -> FinishRun {
    return finish_run<typename decltype(x)::type, typename decltype(p)::type>;
  });
  for_parameters(d, begin, end, [&](int64_t at, int64_t step, int64_t n) {
    loop(shifted(d.zero_point, at), shifted(d.scale, at), step, n, d.scheme);
  });
}

}  // namespace
}  // namespace quantkit

// The object's one exported symbol.
#define QUANTKIT_EXPORT_TABLE(isa)                                                             \
  namespace quantkit {                                                                         \
  extern const KernelTable isa##_table;                                                        \
  const KernelTable isa##_table = {#isa,          quantize,   dequantize, quantize_dequantize, \
                                   fake_quantize, fake_quantize_backward, convert,             \
                                   clear_keys,    reduce,     join_keys,  finish};             \
  }
