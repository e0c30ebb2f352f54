// The functions of a table: loops over chunks. Included by one file for each instruction set.
#pragma once

#include "chunks.h"
#include "errors.h"
#include "linear.h"
#include "products.h"
#include "reduce.h"

namespace quantkit {
namespace {

// From these many elements under one scale on, a reciprocal pays: one with a proof, and one of a
// centred loop (docs/performance.md).
constexpr int64_t kProvedRow = 1024, kCentredRow = 64;

// ---- choosing a loop ----------------------------------------------------------------------------

// Whether steps have loops of their own: all in float, or in x's half precision. Others go step by
// step in double.
bool quantizes_fast(const Elementwise& e) {
  return e.steps.there_in(Type::f32) || (e.x_type != Type::f64 && e.steps.there_in(e.x_type));
}
bool dequantizes_fast(const Elementwise& e) { return e.steps.back_in(Type::f32); }

// For what lies at kQ.
template <class D, class E, class Q>
Loops loops_for(const Elementwise& e) {
  switch (route_of(e.operation).beside) {
    case Beside::codes:
      return route_of(e.operation).back ? loops_of<D, E, Q, true>() : loops_of<D, E, Q, false>();
    case Beside::mask:
    case Beside::gradient: return loops_of<D, E, Mask, true>();
    case Beside::nothing: return loops_of<D, E, None, true>();
    case Beside::outside:
      if constexpr (sizeof(D) != 2 && !kIsRandom<E>) return loops_of<D, E, Outside, true>();
  }
  __builtin_unreachable();
}

Loops loops_of(const Elementwise& e) {
  return with_codes(e.format, [&](auto tag) {
    using F = typename decltype(tag)::type;
    using E = typename F::Encoder;
    using R = Randomly<E>;
    if constexpr (!E::kInteger) {
      return e.seed != nullptr ? loops_for<float, R, uint8_t>(e) : loops_for<float, E, uint8_t>(e);
    } else {  // those of one width are stored alike
      using Q = typename SignedOf<sizeof(typename F::Storage)>::type;
      if (e.seed != nullptr) return loops_for<float, R, Q>(e);
      if (e.steps.round_first) return loops_for<whole, E, Q>(e);
      switch (e.steps.divide) {
        case Type::f16: return loops_for<f16, E, Q>(e);
        case Type::bf16: return loops_for<bf16, E, Q>(e);
        default: return loops_for<float, E, Q>(e);
      }
    }
  });
}

// ---- random draws -------------------------------------------------------------------------------

struct Drawn {
  Draws from{};
  alignas(64) uint16_t draws[kChunk + kDrawsOfWords + kSpareDraws];

  explicit Drawn(const Elementwise& e) {
    if (e.seed != nullptr) from = {uint64_t(e.seed[0]), uint64_t(e.seed[1])};
  }
  // Of n elements with indices `step` apart.
  const uint16_t* get(int64_t first, int64_t step, int64_t n) {
    if (step == 1 || n == 1) {
      const int64_t counter = first / kDrawsOfWords, last = (first + (n - 1)) / kDrawsOfWords;
      fill_draws(draws, counter, last - counter + 1, from);
      return draws + first % kDrawsOfWords;
    }
    for (int64_t i = 0; i < n; ++i) draws[i] = draw(first + i * step, from);
    return draws;
  }
};

// ---- the parameters of both directions ----------------------------------------------------------

struct Quantizer {
  const Elementwise& e;
  const bool there, back, fast;
  const Chunks chunks;
  Values divide, add, subtract, multiply;
  const bool same_scale, same_zero_point;  // in both directions
  Loops loops;
  Loop back_loop = nullptr;
  Rows rows{};
  int64_t scale_known = -1, zero_point_known = -1;  // the offsets that `mode` is for
  Mode mode = kDivide;

  explicit Quantizer(const Elementwise& e_)
      : e(e_),
        there(route_of(e.operation).there),
        back(route_of(e.operation).back),
        fast((!there || quantizes_fast(e)) && (!back || dequantizes_fast(e))),
        chunks(*e.layout, kManyRows, !there && is_float(e.format) ? kShortRowBack : kShortRow,
               !fast),
        divide(e.scale, chunks.scale, fast ? e.steps.divide : Type::f64, false),
        add(e.add, chunks.zero_point, fast ? e.steps.add : Type::f64, fast),
        subtract(e.subtract, chunks.zero_point, fast ? Type::f32 : Type::f64, false),
        multiply(e.scale, chunks.scale, fast ? Type::f32 : Type::f64, false),
        same_scale(!fast || e.steps.divide == Type::f32),
        same_zero_point(e.add.data == e.subtract.data && (!fast || e.steps.add == Type::f32)) {
    rows.q_min = e.q_min;
    rows.q_max = e.q_max;
    if (fast && there) loops = loops_of(e);
    if (fast && !there)
      back_loop = with_format(e.format, [&](auto tag) -> Loop {
        using F = typename decltype(tag)::type;
        return chunks.each ? dequantize_rows<F, true> : dequantize_rows<F, false>;
      });
  }

  // What loops take x for, and in what they make y.
  Type taken() const { return fast ? Type::f32 : Type::f64; }

  // From x to q (codes or a mask), y or both.
  void quantize(const Chunk& c, const void* x, void* q, void* y) {
    rows.x = x;
    rows.q = q;
    rows.y = y;
    rows.rows = c.rows;
    rows.n = c.n;
    rows.divide = divide.get(c.scale, c.first, chunks.values(c));
    rows.add = add.get(c.zero_point, c.first, chunks.values(c));
    if (back) take_back(c);
    if (fast) return loops.of[mode_of(c)](rows);
    Buffer quotients, numbers;
    double* const v = reinterpret_cast<double*>(quotients.bytes);
    double* const number =
        y != nullptr ? static_cast<double*>(y) : reinterpret_cast<double*>(numbers.bytes);
    quantize_mixed(e.steps, static_cast<const double*>(x), v,
                   static_cast<const double*>(rows.divide), static_cast<const double*>(rows.add),
                   c.n);
    encode(v, q, number, c.n);
    if (back) dequantize_mixed(e.steps, number, rows, c.n);
  }

  // From codes to y.
  void dequantize(const Chunk& c, const void* q, void* y) {
    rows.q_in = q;
    rows.y = y;
    rows.rows = c.rows;
    rows.n = c.n;
    take_back(c);
    if (fast) return back_loop(rows);
    with_format(e.format, [&](auto tag) {
      using F = typename decltype(tag)::type;
      const auto* codes = static_cast<const typename F::Storage*>(q);
      for (int64_t i = 0; i < c.n; ++i) static_cast<double*>(y)[i] = F::number(codes[i]);
    });
    dequantize_mixed(e.steps, static_cast<double*>(y), rows, c.n);
  }

 private:
  void take_back(const Chunk& c) {
    const int64_t n = chunks.values(c);
    rows.multiply = there && same_scale ? rows.divide : multiply.get(c.scale, c.first, n);
    rows.subtract = there && same_zero_point ? rows.add : subtract.get(c.zero_point, c.first, n);
  }

  void encode(const double* v, void* q, double* number, int64_t n) const {
    const Beside beside = route_of(e.operation).beside;
    if (beside == Beside::codes)
      return size_of(e.format) == 1 ? encode_mixed<int8_t>(v, q, number, rows, n)
                                    : encode_mixed<int16_t>(v, q, number, rows, n);
    if (beside != Beside::nothing) encode_mixed<Mask>(v, q, number, rows, n);
    encode_mixed<None>(v, q, number, rows, n);
  }

  // The parameters were chosen by a scheme that puts every code within the limits.
  bool centred() const { return e.chosen && e.centred && e.q_max >= 1 && e.q_min <= -e.q_max; }

  Mode mode_of(const Chunk& c) {
    if (chunks.each) return kEach;
    if (e.powers && loops.of[kProduct] != nullptr) return kProduct;
    const int64_t size =
        chunks.row != 0 ? chunks.row : chunks.layout.dims[chunks.layout.count - 1].size;
    if (loops.of[kCentred] != nullptr && centred() && size >= kCentredRow) return kCentred;
    if (!kHasFma || e.seed != nullptr || chunks.row != 0 || size < kProvedRow) return kDivide;
    if (scale_known != c.scale || zero_point_known != c.zero_point) {
      scale_known = c.scale;
      zero_point_known = c.zero_point;
      mode = proved_mode(c);
    }
    return mode;
  }

  // The best loop with a product that gives every code that the quotient gives.
  Mode proved_mode(const Chunk& c) {
    if (!exact_reciprocal(*static_cast<const float*>(rows.divide), rows.reciprocal)) return kDivide;
    const double zero_point = with_float(e.add.type, [&](auto tag) {
      using P = typename decltype(tag)::type;
      return double(widen(static_cast<const P*>(e.add.data)[c.zero_point]));
    });
    // The tiniest quotients are not exact: they vanish beside an integer. What float16 rounds to an
    // infinity must be beyond the limits still when a finite zero point is added.
    const double most = e.steps.divide == Type::f16 ? 0x1p10 : 0x1p20;
    if (!(zero_point >= -most && zero_point <= most) || zero_point != int32_t(zero_point))
      return kDivide;
    if (e.chosen && loops.of[kChosen] != nullptr) return kChosen;
    return zero_point == 0 && loops.of[kNoZeroPoint] != nullptr ? kNoZeroPoint : kReciprocal;
  }
};

// ---- elementwise --------------------------------------------------------------------------------

void quantize(const Elementwise& e, int64_t begin, int64_t end) {
  Quantizer quantizer(e);
  const Chunks& chunks = quantizer.chunks;
  const bool gradient = e.operation == Operation::fake_quantize_backward;
  const bool nontemporal = kHasNontemporal && e.nontemporal && chunks.contiguous;
  const bool codes = route_of(e.operation).beside == Beside::codes;
  const int64_t beside = size_beside(e.operation, e.format, e.y_type);
  Reader x(e.x, e.x_type, quantizer.taken()), grad(e.q_in, beside);
  Writer q =
      codes ? Writer(e.q, e.format, e.packed, nontemporal) : Writer(e.q, beside, nontemporal);
  // Loops take their operands to be apart: in place they write to a buffer.
  Writer y(e.y, e.y_type, gradient ? e.y_type : quantizer.taken(), nontemporal, e.x == e.y);
  const bool whole = chunks.contiguous && quantizer.fast && x.convert == nullptr && !gradient &&
                     e.seed == nullptr && (e.q == nullptr || q.direct()) &&
                     (e.y == nullptr || y.direct());
  Buffer inside, unused;
  Drawn drawn(e);
  chunks.run(begin, end, whole, [&](const Chunk& c) {
    const int64_t n = c.elements();
    const void* const from = x.get(c.x, c.x_step, n);
    void* const beside_x = e.q != nullptr ? q.get(c.q, c.q_step, n) : nullptr;
    void* const to = e.y != nullptr ? y.get(c.y, c.y_step, n) : nullptr;
    if (e.seed != nullptr)
      quantizer.rows.draws = drawn.get(e.first_index + c.index, c.index_step, n);
    if (gradient) {
      quantizer.quantize(c, from, inside.bytes, unused.bytes);
      select_row(size_of(e.y_type), inside.bytes, grad.get(c.q, c.q_step, n), to, n);
    } else {
      quantizer.quantize(c, from, beside_x, to);
    }
    if (e.q != nullptr) q.put(c.q, c.q_step, n);
    if (e.y != nullptr) y.put(c.y, c.y_step, n);
  });
}

void dequantize(const Elementwise& e, int64_t begin, int64_t end) {
  Quantizer quantizer(e);
  const Chunks& chunks = quantizer.chunks;
  Reader q(e.q_in, e.format, e.packed);
  Writer y(e.y, e.y_type, quantizer.taken(), kHasNontemporal && e.nontemporal && chunks.contiguous,
           false);
  const bool whole = chunks.contiguous && quantizer.fast && q.convert == nullptr && y.direct();
  chunks.run(begin, end, whole, [&](const Chunk& c) {
    const int64_t n = c.elements();
    quantizer.dequantize(c, q.get(c.q, c.q_step, n), y.get(c.y, c.y_step, n));
    y.put(c.y, c.y_step, n);
  });
}

void masked_gradient(const Elementwise& e, int64_t begin, int64_t end) {
  const Chunks chunks(*e.layout, kManyRows, kShortRow, false);
  Reader grad(e.x, size_of(e.x_type)), mask(e.q_in, size_beside(e.operation, e.format, e.y_type));
  Writer y(e.y, size_of(e.y_type), kHasNontemporal && e.nontemporal && chunks.contiguous);
  chunks.run(begin, end, chunks.contiguous && y.direct(), [&](const Chunk& c) {
    const int64_t n = c.elements();
    const uint8_t* const keep = static_cast<const uint8_t*>(mask.get(c.q, c.q_step, n));
    select_row(size_of(e.y_type), keep, grad.get(c.x, c.x_step, n), y.get(c.y, c.y_step, n), n);
    y.put(c.y, c.y_step, n);
  });
}

void convert(const Elementwise& e, int64_t begin, int64_t end) {
  const Chunks chunks(*e.layout, kManyRows, kShortRow, false);
  // Half precision takes the way through float, or double; a copy is bytes.
  const Type middle = e.y_type == Type::f64 ? Type::f64 : Type::f32;
  Reader x(e.x, e.x_type, middle);
  Writer y(e.y, e.y_type, middle, false, true);
  chunks.run(begin, end, false, [&](const Chunk& c) {
    const int64_t n = c.elements();
    memcpy(y.get(c.y, c.y_step, n), x.get(c.x, c.x_step, n), n * size_of(middle));
    y.put(c.y, c.y_step, n);
  });
}

// Ranges count bytes, all of them one after the other.
void pack(const Elementwise& e, int64_t begin, int64_t end) {
  const int64_t codes = per_byte(e.format);
  pack_of(e.format)(static_cast<const char*>(e.q_in) + begin * codes,
                    static_cast<char*>(e.q) + begin, (end - begin) * codes);
}
void unpack(const Elementwise& e, int64_t begin, int64_t end) {
  const int64_t codes = per_byte(e.format);
  unpack_of(e.format)(static_cast<const char*>(e.q_in) + begin,
                      static_cast<char*>(e.q) + begin * codes, (end - begin) * codes);
}

void elementwise(const Elementwise& e, int64_t begin, int64_t end) {
  switch (e.operation) {
    case Operation::quantize:
    case Operation::quantize_dequantize:
    case Operation::fake_quantize:
    case Operation::fake_quantize_masked:
    case Operation::fake_quantize_backward: return quantize(e, begin, end);
    case Operation::dequantize: return dequantize(e, begin, end);
    case Operation::masked_gradient: return masked_gradient(e, begin, end);
    case Operation::convert: return convert(e, begin, end);
    case Operation::pack: return pack(e, begin, end);
    case Operation::unpack: return unpack(e, begin, end);
    case Operation::measure:
    case Operation::choose: return;
  }
}

// By float32 steps.
void measure(const Elementwise& e, int64_t begin, int64_t end, Measured& measured) {
  Quantizer quantizer(e);
  Reader x(e.x, e.x_type, Type::f32);
  Buffer outside, y, magnitudes, errors;
  float *const x_hat = reinterpret_cast<float*>(y.bytes),
               *const kept = reinterpret_cast<float*>(magnitudes.bytes),
               *const error = reinterpret_cast<float*>(errors.bytes);
  quantizer.chunks.run(begin, end, false, [&](const Chunk& c) {
    const int64_t n = c.elements();
    const float* const from = static_cast<const float*>(x.get(c.x, c.x_step, n));
    quantizer.quantize(c, from, outside.bytes, x_hat);
    const Finite finite = finite_errors(from, x_hat, kept, error, n);
    add_squares(kept, n, finite.most_x, measured.squares);
    add_squares(error, n, finite.most_error, measured.errors);
    measured.max_error = larger<int64_t>(measured.max_error, finite.most_error);
    measured.outside += count_of(outside.bytes, n);
    measured.left_out += finite.left_out;
  });
}

// ---- choosing parameters ------------------------------------------------------------------------

// Calls f with the tag of x's type and that of the reduction over it.
template <class F>
auto with_reduction_of(const Dynamic& d, F f) {
  return with_float(d.elements.x_type, [&](auto x) {
    return with_reduction<typename decltype(x)::type>(
        d.scheme, [&](auto reduction) { return f(x, reduction); });
  });
}

int64_t state_bytes(const Dynamic& d) {
  return with_reduction_of(d, [](auto, auto tag) -> int64_t {
    using R = typename decltype(tag)::type;
    return R::kKeys * sizeof(typename R::Bits);
  });
}

void first_states(const Dynamic& d, const States& states) {
  with_reduction_of(d, [&](auto x, auto tag) {
    Reduction<typename decltype(x)::type, typename decltype(tag)::type>::first(states.keys,
                                                                               states.count);
  });
}

void join(const Dynamic& d, const States& to, const States& from) {
  with_reduction_of(d, [&](auto x, auto tag) {
    Reduction<typename decltype(x)::type, typename decltype(tag)::type>::join(to.keys, from.keys,
                                                                              to.count);
  });
}

void reduce(const Dynamic& d, int64_t begin, int64_t end, const States& states) {
  using Loop = void (*)(const Reduce&);
  const Loop loop = with_reduction_of(d, [](auto x, auto tag) -> Loop {
    return Reduction<typename decltype(x)::type, typename decltype(tag)::type>::rows;
  });
  Layout layout = *d.reduced;
  const Dim inner = layout.dims[layout.count - 1];
  const Dim* const outer = layout.count > 1 ? &layout.dims[layout.count - 2] : nullptr;
  // Short rows that lie one after the other are given to a loop many at a time, as are rows of
  // columns.
  const bool adjacent =
      outer != nullptr && inner.stride[kX] == 1 && outer->stride[kX] == inner.size;
  const bool columns = inner.stride[kState] != 0;
  const bool rows = adjacent && !columns && inner.size < kChunk && begin % inner.size == 0 &&
                    end % inner.size == 0;
  const bool periods =
      adjacent && columns && outer->stride[kState] == 0 && inner.size < kShortColumns;
  Reduce r{};
  r.keys = states.keys;
  r.count = states.count;
  r.columns = columns ? inner.size : 0;
  if (rows) {
    --layout.count;
    begin /= inner.size;
    end /= inner.size;
  } else if (periods) {
    --layout.count;
    Dim& joined = layout.dims[layout.count - 1];
    joined.size *= inner.size;
    joined.stride[kX] = 1;
  }
  const int64_t step = layout.dims[layout.count - 1].stride[kX],
                row_states = layout.dims[layout.count - 1].stride[kState];
  Reader x(d.elements.x, size_of(d.elements.x_type));
  for_pieces(layout, begin, end, [&](const Offsets& at, int64_t first, int64_t n) {
    const int64_t most = rows || step == 1 ? n : kChunk;
    for (int64_t done = 0; done < n; done += most) {
      const int64_t m = smaller(most, n - done);
      const int64_t offset = at.of[kX] + done * step;
      r.x = rows ? x.get(offset, 1, 1) : x.get(offset, step, m);
      r.rows = rows ? m : 1;
      r.n = rows ? inner.size : m;
      r.outer = row_states;
      r.first = columns ? (first + done) % inner.size : 0;
      r.state = at.of[kState] - states.first - (columns && !periods ? first * row_states : 0);
      loop(r);
    }
  });
}

void finalize(const Dynamic& d, int64_t begin, int64_t end, const States& states) {
  const Layout& layout = *d.parameters;
  const Dim& inner = layout.dims[layout.count - 1];
  const bool dense =
      inner.stride[kScale] == 1 && (inner.stride[kZeroPoint] == 1 || d.zero_point == nullptr);
  using Loop = void (*)(const Finalize&, const Scheme&);
  const Loop loop = with_reduction_of(d, [&](auto x, auto tag) -> Loop {
    using X = typename decltype(x)::type;
    using R = typename decltype(tag)::type;
    if (d.stored != nullptr) return finalize_stored_row<X>;
    if (d.scheme.extremes)
      return dense ? finalize_row<X, X, Extremes<X>, true> : finalize_row<X, X, Extremes<X>, false>;
    if constexpr (sizeof(X) != 4)  // other types may have parameters of float
      if (d.p_type == Type::f32)
        return dense ? finalize_row<X, float, R, true> : finalize_row<X, float, R, false>;
    return dense ? finalize_row<X, X, R, true> : finalize_row<X, X, R, false>;
  });
  const int64_t size = size_of(d.p_type);
  const auto at_of = [](void* data, int64_t offset) -> char* {
    return data == nullptr ? nullptr : static_cast<char*>(data) + offset;
  };
  for_pieces(layout, begin, end, [&](const Offsets& at, int64_t, int64_t n) {
    loop({states.keys, at.of[kState] - states.first, states.count,
          at_of(d.scale, at.of[kScale] * size), at_of(d.zero_point, at.of[kZeroPoint] * size),
          inner.stride[kScale], inner.stride[kZeroPoint], n,
          at_of(d.stored, at.of[kScale] * size_of(d.scheme.stored)),
          static_cast<const float*>(d.global.data) + (d.each_global ? at.of[kScale] : 0),
          d.each_global},
         d.scheme);
  });
}

}  // namespace
}  // namespace quantkit

// The object's one exported symbol.
#define QUANTKIT_EXPORT_TABLE(isa)                                     \
  namespace quantkit {                                                 \
  extern const KernelTable isa##_table;                                \
  const KernelTable isa##_table = {                                    \
      elementwise, state_bytes, first_states, reduce,                  \
      join,        finalize,    measure,      {linear_tasks, linear}}; \
  }
