// The functions of a table: loops over walks. Included by one file for each instruction set.
#pragma once

#include "walk.h"

namespace quantkit {
namespace {

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
