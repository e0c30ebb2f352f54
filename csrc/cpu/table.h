// The functions of a table: loops over walks. Included by one file for each instruction set.
#pragma once

#include "walk.h"

namespace quantkit {
namespace {

// From these many elements on a reciprocal pays: one with a proof for given parameters, one without, and one
// with a proof for chosen parameters (docs/performance.md).
constexpr int64_t kLongRun = kManyRows, kCorrectedRun = 64, kProofRun = 4096;

// The parameters of both directions, and how many values of each a chunk takes.
struct Given {
  const Elementwise& e;
  Plan plan;
  Values divide, add, subtract, multiply;
  Loops loops;
  Run run{};
  bool whole;
  bool same_scale, same_zero_point;  // in both directions: float, of one tensor
  int64_t scale_known = -1, zero_point_known = -1;  // the offsets that `mode` is for
  Mode mode = kShared;

  Given(const Elementwise& e_, const Loops& loops_)
      : e(e_),
        plan(e_.shape, corrects(e_, loops_) ? kProofRun : kManyRows),
        divide(e_.scale, plan.scale, e_.divide_type, false),
        add(e_.add_zero_point, plan.zero_point, e_.add_type, true),
        subtract(e_.subtract_zero_point, plan.zero_point, e_.subtract_type, false),
        multiply(e_.scale, plan.scale, e_.scale_type, false),
        loops(loops_),
        whole(plan.contiguous && !(kStreams && e_.streams)),
        same_scale(e_.divide_type == Type::f32 && e_.scale_type == Type::f32),
        same_zero_point(e_.add_type == Type::f32 && e_.subtract_type == Type::f32 &&
                        e_.add_zero_point.data == e_.subtract_zero_point.data) {
    run.q_min = e.q_min;
    run.q_max = e.q_max;
  }

  bool streams() const { return kStreams && e.streams && plan.contiguous; }
  int64_t values(const Chunk& c) const { return plan.each ? c.n : c.rows; }

  // Quantizes x to q, y or both, as the loops do.
  void quantize(const Chunk& c, const void* x, void* q, void* y) {
    run.x = x;
    run.q = q;
    run.y = y;
    run.rows = c.rows;
    run.n = c.n;
    run.divide = divide.get(c.scale, c.first, values(c));
    run.add = add.get(c.zero_point, c.first, values(c));
    if (y != nullptr) {
      run.multiply = same_scale ? run.divide : multiply.get(c.scale, c.first, values(c));
      run.subtract = same_zero_point ? run.add : subtract.get(c.zero_point, c.first, values(c));
    }
    loops.of[mode_of(c)](run);
  }
  void dequantize(Loop loop, const Chunk& c, const void* q, void* y) {
    run.q_in = q;
    run.y = y;
    run.rows = c.rows;
    run.n = c.n;
    run.multiply = multiply.get(c.scale, c.first, values(c));
    run.subtract = subtract.get(c.zero_point, c.first, values(c));
    loop(run);
  }

 private:
  Mode mode_of(const Chunk& c) {
    if (plan.each) return kEach;
    if (loops.of[kFma] == nullptr) return kShared;
    const int64_t size = plan.row != 0 ? plan.row : plan.levels[plan.count - 1].size;
    const bool corrected = corrects(e, loops) && size >= kCorrectedRun;
    if (corrected && size < kProofRun) return kCorrected;
    if (plan.row != 0 || size < kLongRun) return kShared;
    if (scale_known != c.scale || zero_point_known != c.zero_point) {
      scale_known = c.scale;
      zero_point_known = c.zero_point;
      mode = multiplied(c);
      if (mode == kShared && corrected) mode = kCorrected;
    }
    return mode;
  }

  // The best loop that multiplies, for one scale; kShared where its quotients might differ.
  Mode multiplied(const Chunk& c) {
    if constexpr (!kHasFma) return kShared;
    if (!exact_reciprocal(*static_cast<const float*>(run.divide), run.reciprocal)) return kShared;
    const double zero_point = with_float(add.parameter.type, [&](auto tag) {
      using P = typename decltype(tag)::type;
      return double(widen(static_cast<const P*>(add.parameter.data)[c.zero_point]));
    });
    // The tiniest quotients are not exact: they vanish beside an integer. What float16 rounds to an infinity
    // must be beyond the limits still when a finite zero point is added.
    const bool half = e.divide_type == Type::f16 || e.add_type == Type::f16;
    const double most = half ? 0x1p10 : 0x1p20;
    if (!(zero_point >= -most && zero_point <= most) || zero_point != int32_t(zero_point))
      return kShared;
    if (!e.chosen || loops.of[kFinite] == nullptr) return zero_point == 0 ? kZero : kFma;
    // x held no NaN: the scale would be one.
    return centred(e) ? kCentred : kFinite;
  }

  // Whether the scheme that chose the parameters puts every code within the limits.
  static bool centred(const Elementwise& e) {
    return e.chosen && e.symmetric && e.q_max >= 1 && e.q_min <= -e.q_max;
  }
  static bool corrects(const Elementwise& e, const Loops& loops) {
    return centred(e) && loops.of[kCorrected] != nullptr;
  }
};

void quantize(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e, quantize_loops(e, e.q_type));
  Reader x(e.x, e.x_type, is_widened(e));
  Writer q(e.q, e.q_type, given.streams());
  given.plan.run(begin, end, given.whole && !is_widened(e), [&](const Chunk& c) {
    given.quantize(c, x.get(c.x, c.xs, c.elements()), q.get(c.q, c.qs, c.elements()), nullptr);
    q.put(c.q, c.qs, c.elements());
  });
}

void dequantize(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e, Loops());
  const Loop loop = dequantize_loop(e, e.q_type, given.plan.each);
  Reader q(e.q_in, e.q_type);
  Writer y(e.y, e.scale_type, given.streams());
  given.plan.run(begin, end, given.whole, [&](const Chunk& c) {
    given.dequantize(loop, c, q.get(c.q, c.qs, c.elements()), y.get(c.y, c.ys, c.elements()));
    y.put(c.y, c.ys, c.elements());
  });
}

void quantize_dequantize(const Elementwise& e, int64_t begin, int64_t end) {
  const bool fused = is_fused(e);
  Given given(e, fused ? quantize_dequantize_loops(e) : quantize_loops(e, e.q_type));
  const Loop back = dequantize_loop(e, e.q_type, given.plan.each);
  Reader x(e.x, e.x_type, is_widened(e));
  Writer q(e.q, e.q_type, given.streams()), y(e.y, e.scale_type, given.streams());
  given.plan.run(begin, end, given.whole && fused && !is_widened(e), [&](const Chunk& c) {
    const void* from = x.get(c.x, c.xs, c.elements());
    void* codes = q.get(c.q, c.qs, c.elements());
    void* to = y.get(c.y, c.ys, c.elements());
    given.quantize(c, from, codes, fused ? to : nullptr);
    if (!fused) given.dequantize(back, c, codes, to);
    q.put(c.q, c.qs, c.elements());
    y.put(c.y, c.ys, c.elements());
  });
}

void fake_quantize(const Elementwise& e, int64_t begin, int64_t end) {
  const bool fused = is_fused(e);
  Given given(e, fused ? fake_quantize_loops(e) : quantize_loops(e, Type::i16));
  const Loop back = dequantize_loop(e, Type::i16, given.plan.each);
  const ConvertRun convert = convert_loop(e.scale_type, e.y_type);
  Reader x(e.x, e.x_type, is_widened(e));
  // Loops take their operands to be apart: in place they write to scratch.
  const bool in_place = e.x == e.y;
  Writer y(e.y, e.y_type, given.streams(), in_place);
  const bool direct = fused && !is_widened(e);
  Scratch codes, wide;
  given.plan.run(begin, end, given.whole && direct && !in_place, [&](const Chunk& c) {
    const void* from = x.get(c.x, c.xs, c.elements());
    void* to = y.get(c.y, c.ys, c.elements());
    if (direct) {
      given.quantize(c, from, nullptr, to);
    } else {
      if (fused) {
        given.quantize(c, from, nullptr, wide.bytes);
      } else {
        given.quantize(c, from, codes.bytes, nullptr);
        given.dequantize(back, c, codes.bytes, wide.bytes);
      }
      convert(wide.bytes, to, c.elements());
    }
    y.put(c.y, c.ys, c.elements());
  });
}

void fake_quantize_backward(const Elementwise& e, int64_t begin, int64_t end) {
  Given given(e, quantize_loops<bool>(e));
  Reader x(e.x, e.x_type, is_widened(e)), grad(e.q_in, e.y_type);
  Writer y(e.y, e.y_type, given.streams());
  bool inside[kChunk];
  given.plan.run(begin, end, false, [&](const Chunk& c) {
    given.quantize(c, x.get(c.x, c.xs, c.elements()), inside, nullptr);
    const void* from = grad.get(c.q, c.qs, c.elements());
    void* to = y.get(c.y, c.ys, c.elements());
    switch (size_of(e.y_type)) {
      case 2: select_run<int16_t>(inside, from, to, c.elements()); break;
      case 4: select_run<int32_t>(inside, from, to, c.elements()); break;
      default: select_run<int64_t>(inside, from, to, c.elements());
    }
    y.put(c.y, c.ys, c.elements());
  });
}

void convert(const Conversion& c, int64_t begin, int64_t end) {
  const ConvertRun loop = convert_loop(c.x_type, c.y_type);
  const Plan plan(c.shape);
  Reader x(c.x, c.x_type);
  Writer y(c.y, c.y_type, false);
  plan.run(begin, end, plan.contiguous, [&](const Chunk& k) {
    loop(x.get(k.x, k.xs, k.elements()), y.get(k.y, k.ys, k.elements()), k.elements());
    y.put(k.y, k.ys, k.elements());
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
  const ReduceLoop loop = with_dynamic_types(d, [&](auto x, auto p) -> ReduceLoop {
    using X = typename decltype(x)::type;
    using P = typename decltype(p)::type;
    return d.scheme.symmetric ? reduce_run<X, P, true> : reduce_run<X, P, false>;
  });
  const Shape& shape = d.elements.shape;
  Level levels[kMaxLevels];
  int32_t count = shape.count;
  for (int32_t k = 0; k < count; ++k) levels[k] = shape.levels[k];
  Offsets base;
  if (part.level >= 0) {
    base.move(levels[part.level], part.begin);
    levels[part.level].size = part.end - part.begin;
  }
  // Short rows that lie one after the other are given to the loop many at a time.
  const int64_t row = levels[count - 1].size, *inner = levels[count - 1].step;
  const bool rows = count > 1 && row < kProofRun && inner[kScale] == 0 && inner[kX] == 1 &&
                    levels[count - 2].step[kX] == row && begin % row == 0 && end % row == 0;
  if (rows) {
    --count;
    begin /= row;
    end /= row;
  }
  Reader x(d.elements.x, d.elements.x_type);
  const int64_t* step = levels[count - 1].step;
  const int64_t p_size = size_of(d.p_type);
  walk(levels, count, begin, end, [&](const Offsets& at, int64_t, int64_t n) {
    const int64_t whole = rows || step[kX] == 1 ? n : kChunk;
    for (int64_t done = 0; done < n; done += whole) {
      const int64_t m = smaller(whole, n - done);
      const int64_t key = (base.of[kScale] + at.of[kScale] + done * step[kScale]) * p_size;
      const int64_t offset = base.of[kX] + at.of[kX] + done * step[kX];
      ReduceRun run{nullptr, shifted(low, key), shifted(high, key), step[kScale], 0, m, row};
      if (rows) {
        run.x = x.get(offset, 1, 1);
      } else {
        run.x = x.get(offset, step[kX], m);
        run.outer = 0, run.inner = step[kScale], run.rows = 1, run.n = m;
      }
      loop(run);
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

template <class X, class P, bool kDense>
FinishLoop finish_loop(const Dynamic& d) {
  return d.scheme.symmetric ? finish_run<X, P, true, kDense> : finish_run<X, P, false, kDense>;
}

void finish(const Dynamic& d, int64_t begin, int64_t end) {
  for_parameters(d, begin, end, [&](int64_t at, int64_t step, int64_t n) {
    const FinishLoop loop = with_dynamic_types(d, [&](auto x, auto p) -> FinishLoop {
      using X = typename decltype(x)::type;
      using P = typename decltype(p)::type;
      return step == 1 ? finish_loop<X, P, true>(d) : finish_loop<X, P, false>(d);
    });
    loop(shifted(d.zero_point, at), shifted(d.scale, at), step, n, d.scheme);
  });
}

}  // namespace
}  // namespace quantkit

// The object's one exported symbol.
#define QUANTKIT_EXPORT_TABLE(isa)                                                             \
  namespace quantkit {                                                                         \
  extern const KernelTable isa##_table;                                                        \
  const KernelTable isa##_table = {quantize,      dequantize, quantize_dequantize,             \
                                   fake_quantize, fake_quantize_backward, convert,             \
                                   clear_keys,    reduce,     join_keys,  finish};             \
  }
