// From the structs of kernels.h to launches: which kernel, how many threads for what.
#pragma once

#include <type_traits>

#include "../cpu/fpenv.h"
#include "dynamic.cuh"
#ifndef QUANTKIT_EMULATE
#include "launch.h"
#endif

namespace quantkit {
namespace {

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two_from(int64_t n, int64_t most) {
  int64_t power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

int64_t blocks_for(int64_t wanted) {
  const int64_t most = multiprocessors() * kBlocksPerProcessor;
  return wanted < most ? wanted : most;
}

// Rows of n elements in vectors of `width`: how many vectors a row takes at most, one more where some rows begin
// between two aligned addresses, and whether some vectors are not whole. The rows begin at `data`, and the steps
// of `levels` lie between them.
struct Vectors {
  int64_t count;
  bool ragged;
};
Vectors vectors_of(const void* data, int64_t size, Operand o, const Level* levels, int count,
                   const Level& row, int64_t width) {
  const int64_t n = row.size;
  if (row.step[o] != 1) return {divided_up(n, width), true};
  bool aligned = reinterpret_cast<uintptr_t>(data) % (size * width) == 0;
  for (int k = 0; k < count; ++k) aligned &= levels[k].size == 1 || levels[k].step[o] % width == 0;
  return {divided_up(n + (aligned ? 0 : width - 1), width), !aligned || n % width != 0};
}

// ---- elementwise ----------------------------------------------------------------------------------

// `step` is the type that a step rounds the parameter to first, where it does.
Numbers numbers_of(const Parameter& p, Type step = Type::f64) {
  Numbers n{p.data, 0, p.type};
  if (p.on_host) {
    FloatingPointGuard guard;  // the caller's environment must not flush a denormal or round otherwise
    n.value = with_float(p.type, [&](auto tag) -> double {
      return widen(*static_cast<const typename decltype(tag)::type*>(p.data));
    });
    n.value = with_float(step, [&](auto tag) -> double {
      using D = typename decltype(tag)::type;
      return rounded<D>(static_cast<Wide<D>>(n.value));
    });
    n.data = nullptr;
  }
  return n;
}

// The innermost level becomes the row; around it there is one level at least.
void fill_rows(ElementwiseArgs& a, const Shape& shape) {
  const Level& inner = shape.levels[shape.count - 1];
  a.count = shape.count > 1 ? shape.count - 1 : 1;
  a.levels[0] = Level{1, {}};
  for (int k = 0; k + 1 < shape.count; ++k) a.levels[k] = shape.levels[k];
  a.rows = shape.numel / inner.size;
  a.n = inner.size;
  for (int o = 0; o < kOperands; ++o) a.step[o] = inner.step[o];
}

// Teams for rows in vectors, of which a thread takes `each`; the number of teams.
int64_t fill_teams(ElementwiseArgs& a, int64_t vectors, int each) {
  const int64_t threads = divided_up(vectors, each);
  a.team = static_cast<int32_t>(power_of_two_from(threads, threads > 4 * kWarp ? kThreads : kWarp));
  a.parts = divided_up(threads, a.team);
  return a.rows * a.parts;
}

// The same where each element has its own parameters: rows that share them are taken together, as many as leave
// enough teams.
int64_t fill_columns(ElementwiseArgs& a, int64_t vectors) {
  constexpr int64_t kMostRows = 64;
  a.team = static_cast<int32_t>(power_of_two_from(vectors, kWarp));
  a.parts = divided_up(vectors, a.team);
  const Level& around = a.levels[a.count - 1];
  a.height = 1;
  if (around.step[kScale] == 0 && around.step[kZeroPoint] == 0) {
    const int64_t enough = multiprocessors() * 8 * (kThreads / a.team);
    const int64_t height = a.rows * a.parts / enough;
    a.height = height < 1 ? 1 : height < kMostRows ? height : kMostRows;
    if (a.height > around.size) a.height = around.size;
  }
  return a.rows / around.size * divided_up(around.size, a.height) * a.parts;
}

using ElementwiseKernel = void (*)(ElementwiseArgs);

template <Result kResult, class X, class D>
ElementwiseKernel quantize_kernel_of(bool each) {
  if constexpr (kResult != Result::gradient)
    if (each) return quantize_kernel<X, D, kResult, true>;
  return each ? nullptr : quantize_kernel<X, D, kResult, false>;
}

// Whether parameters that are many have the type of the steps.
bool have_type(const Elementwise& e, Type type, bool back) {
  const auto has = [&](const Parameter& p) { return p.on_host || p.type == type; };
  return has(e.scale) && has(e.add_zero_point) && (!back || has(e.subtract_zero_point));
}

// Null where the types of the steps are mixed.
template <Result kResult>
ElementwiseKernel quantize_kernel_of(const Elementwise& e, bool each) {
  const bool back = kResult == Result::both || kResult == Result::fake;
  if (e.divide_type != e.add_type) return nullptr;
  if (back && (e.subtract_type != Type::f32 || e.scale_type != Type::f32)) return nullptr;
  if (each && !have_type(e, e.divide_type, back)) return nullptr;
  if (e.divide_type == e.x_type) {
    switch (e.x_type) {
      case Type::f16: return quantize_kernel_of<kResult, f16, f16>(each);
      case Type::bf16: return quantize_kernel_of<kResult, bf16, bf16>(each);
      case Type::f32: return quantize_kernel_of<kResult, float, float>(each);
      default: return nullptr;
    }
  }
  // Parameters chosen from half precision are float only for wide ranges: not worth kernels of their own.
  if constexpr (kResult != Result::both) {
    if (e.divide_type != Type::f32) return nullptr;
    return e.x_type == Type::f16 ? quantize_kernel_of<kResult, f16, float>(each)
                                 : quantize_kernel_of<kResult, bf16, float>(each);
  }
  return nullptr;
}

template <class Q>
ElementwiseKernel dequantize_kernel_of(bool each) {
  return each ? dequantize_kernel<Q, true> : dequantize_kernel<Q, false>;
}
ElementwiseKernel dequantize_kernel_of(const Elementwise& e, bool each) {
  if (e.subtract_type != Type::f32 || e.scale_type != Type::f32) return nullptr;
  if (each && !have_type(e, Type::f32, true)) return nullptr;
  switch (e.q_type) {
    case Type::i8: return dequantize_kernel_of<int8_t>(each);
    case Type::u8: return dequantize_kernel_of<uint8_t>(each);
    case Type::i16: return dequantize_kernel_of<int16_t>(each);
    default: return nullptr;
  }
}

struct Choice {
  ElementwiseKernel typed, mixed;
};
Choice choice_of(Operation operation, const Elementwise& e, bool each) {
  switch (operation) {
    case Operation::quantize:
      return {quantize_kernel_of<Result::codes>(e, each), quantize_mixed_kernel<Result::codes>};
    case Operation::quantize_dequantize:
      return {quantize_kernel_of<Result::both>(e, each), quantize_mixed_kernel<Result::both>};
    case Operation::fake_quantize:
      return {quantize_kernel_of<Result::fake>(e, each), quantize_mixed_kernel<Result::fake>};
    case Operation::fake_quantize_backward:
      return {quantize_kernel_of<Result::gradient>(e, each), quantize_mixed_kernel<Result::gradient>};
    default: return {dequantize_kernel_of(e, each), dequantize_mixed_kernel};
  }
}

const char* run_elementwise(Operation operation, const Elementwise& e, void* stream) {
  ElementwiseArgs a{};
  fill_rows(a, e.shape);
  a.x = e.x;
  a.q_in = e.q_in;
  a.q = e.q;
  a.y = e.y;
  a.scale = numbers_of(e.scale);
  a.add = numbers_of(e.add_zero_point, e.add_type);
  a.subtract = numbers_of(e.subtract_zero_point);
  a.x_type = e.x_type;
  a.q_type = e.q_type;
  a.y_type = e.y_type;
  a.divide_type = e.divide_type;
  a.add_type = e.add_type;
  a.subtract_type = e.subtract_type;
  a.scale_type = e.scale_type;
  a.q_min = e.q_min;
  a.q_max = e.q_max;
  const bool each = a.step[kScale] != 0 || a.step[kZeroPoint] != 0;
  const Choice choice = choice_of(operation, e, each);
  int64_t teams;
  if (choice.typed == nullptr) {
    teams = fill_teams(a, a.n, kMixedRun);
  } else {
    const Operand lead = operation == Operation::dequantize ? kY : kX;
    const int64_t size = size_of(lead == kY ? Type::f32 : e.x_type);
    const Vectors v = vectors_of(lead == kY ? e.y : e.x, size, lead, a.levels, a.count,
                                 e.shape.levels[e.shape.count - 1], kVectorBytes / size);
    a.ragged = v.ragged;
    teams = each ? fill_columns(a, v.count) : fill_teams(a, v.count, kUnroll);
  }
  const int64_t blocks = blocks_for(divided_up(teams, kThreads / a.team));
  return launch(choice.typed != nullptr ? choice.typed : choice.mixed, blocks, kThreads, stream, a);
}

const char* run_convert(const Conversion& c, void* stream) {
  ElementwiseArgs a{};
  fill_rows(a, c.shape);
  a.x = c.x;
  a.y = c.y;
  a.x_type = c.x_type;
  a.y_type = c.y_type;
  const int64_t teams = fill_teams(a, a.n, kMixedRun);
  const ElementwiseKernel kernel = with_float(c.y_type, [](auto tag) -> ElementwiseKernel {
    return convert_kernel<typename decltype(tag)::type>;
  });
  return launch(kernel, blocks_for(divided_up(teams, kThreads / a.team)), kThreads, stream, a);
}

// ---- choosing parameters --------------------------------------------------------------------------

using SetKernel = void (*)(SetArgs);

int64_t key_bytes(const Dynamic& d) { return d.elements.x_type == Type::f64 ? 8 : 4; }

// Levels that step from parameter to parameter first, then those within a set.
void fill_sets(SetArgs& a, const Dynamic& d) {
  const Shape& shape = d.elements.shape;
  a.count = 0;
  a.sets = a.n = 1;
  for (int k = 0; k < shape.count; ++k)
    if (shape.levels[k].step[kScale] != 0) {
      a.sets *= shape.levels[k].size;
      a.levels[a.count++] = shape.levels[k];
    }
  if (a.count == 0) a.levels[a.count++] = Level{1, {}};
  a.outer = a.count;
  for (int k = 0; k < shape.count; ++k)
    if (shape.levels[k].step[kScale] == 0) {
      a.n *= shape.levels[k].size;
      a.levels[a.count++] = shape.levels[k];
    }
  if (a.count == a.outer) a.levels[a.count++] = Level{1, {}};
}

// As many parts of each of `sets` as fill the device, of no fewer elements than `least`.
int64_t parts_of(int64_t n, int64_t least, int64_t sets) {
  const int64_t wanted = divided_up(n, least);
  const int64_t most = divided_up(multiprocessors() * kBlocksPerProcessor / 4, sets);
  return wanted < most ? wanted : most;
}

template <class X>
void fill_vectors(SetArgs& a, int row, int outer) {
  const Vectors v = vectors_of(a.x, sizeof(X), kX, a.levels, outer, a.levels[row], kVectorBytes / sizeof(X));
  a.vectors = v.count;
  a.ragged = v.ragged;
}

// One read.
template <class X>
const char* run_rows(SetArgs& a, void* stream) {
  fill_vectors<X>(a, a.count - 1, a.outer);
  const int64_t threads = divided_up(a.vectors, kHeld);
  int block = kThreads;
  if (threads <= kWarp) {
    a.team = static_cast<int32_t>(power_of_two_from(threads, kWarp));
  } else {
    const int64_t whole = divided_up(threads, kWarp) * kWarp;
    a.team = block = static_cast<int>(whole < kMostThreads ? whole : kMostThreads);
  }
  const int64_t blocks = blocks_for(divided_up(a.sets, block / a.team));
  const SetKernel kernel = a.scheme.symmetric ? rows_kernel<X, true> : rows_kernel<X, false>;
  return launch(kernel, blocks, block, stream, a);
}

template <class X>
const char* run_reduce(SetArgs& a, void* stream) {
  constexpr int kWidth = kVectorBytes / sizeof(X);
  a.parts = parts_of(a.n, int64_t(kThreads) * kUnroll * kWidth, a.sets);
  const SetKernel kernel = a.scheme.symmetric ? reduce_kernel<X, true> : reduce_kernel<X, false>;
  return launch(kernel, blocks_for(a.sets * a.parts), kThreads, stream, a);
}

template <class X>
const char* run_columns(SetArgs& a, void* stream) {
  fill_vectors<X>(a, a.outer - 1, a.outer - 1);
  a.team = static_cast<int32_t>(power_of_two_from(a.vectors, kWarp));
  const int64_t pieces = a.sets / a.levels[a.outer - 1].size * divided_up(a.vectors, a.team);
  a.parts = parts_of(a.n, int64_t(kThreads / a.team) * 16, pieces);
  const SetKernel kernel = a.scheme.symmetric ? columns_kernel<X, true> : columns_kernel<X, false>;
  return launch(kernel, blocks_for(pieces * a.parts), kThreads, stream, a);
}

// Calls f with the tags of x's type and of the parameters': the same, or float for half precision.
template <class F>
auto with_set_types(const SetArgs& a, F f) {
  return with_float(a.x_type, [&](auto x) {
    if constexpr (sizeof(typename decltype(x)::type) == 2)
      if (a.p_type == Type::f32) return f(x, Tag<float>());
    return f(x, x);
  });
}

// Whether neighbours in memory belong to different sets.
bool has_columns(const Shape& shape) { return shape.levels[shape.count - 1].step[kScale] != 0; }

bool takes_rows(const SetArgs& a, const Dynamic& d) {
  if (has_columns(d.elements.shape) || a.count - a.outer > 1) return false;
  if (d.elements.x_type == Type::f64 || d.p_type != d.elements.x_type) return false;
  // Few sets must be split to fill the device, where they are more than a block holds in registers.
  const int64_t held = int64_t(kMostThreads) * kHeld * kVectorBytes / size_of(d.elements.x_type);
  return a.n <= held || a.sets >= 2 * multiprocessors();
}

// Two keys for each parameter, where they are not kept in registers.
int64_t scratch_bytes(const Dynamic& d) {
  SetArgs a{};
  fill_sets(a, d);
  return takes_rows(a, d) ? 0 : 2 * d.parameters.numel * key_bytes(d);
}

const char* run_dynamic(const Dynamic& d, Operation fused, void* scratch, void* stream) {
  SetArgs a{};
  fill_sets(a, d);
  a.scheme = d.scheme;
  a.x = d.elements.x;
  a.q = fused != Operation::none ? d.elements.q : nullptr;
  a.y = fused == Operation::quantize_dequantize ? d.elements.y : nullptr;
  a.scale = d.scale;
  a.zero_point = d.zero_point;
  a.low = scratch;
  a.high = static_cast<char*>(scratch) + d.parameters.numel * key_bytes(d);
  a.x_type = d.elements.x_type;
  a.p_type = d.p_type;
  a.q_type = d.elements.q_type;
  const Level& inner = a.levels[a.count - 1];
  const int width = kVectorBytes / static_cast<int>(size_of(a.x_type));
  a.gathers = a.count - a.outer > 1 && inner.size % width != 0;
  if (takes_rows(a, d)) {
    switch (a.x_type) {
      case Type::f16: return run_rows<f16>(a, stream);
      case Type::bf16: return run_rows<bf16>(a, stream);
      default: return run_rows<float>(a, stream);
    }
  }
  const bool columns = has_columns(d.elements.shape);
  const int64_t parameters = blocks_for(divided_up(d.parameters.numel, kThreads));
  return with_set_types(a, [&](auto x, auto p) -> const char* {
    using X = typename decltype(x)::type;
    using P = typename decltype(p)::type;
    // Keys are made of bits alone: one kernel serves all types of 16.
    using Bits = typename std::conditional<sizeof(X) == 2, f16, X>::type;
    const char* error = launch<SetArgs>(clear_kernel<Bits>, parameters, kThreads, stream, a);
    if (error == nullptr) error = columns ? run_columns<Bits>(a, stream) : run_reduce<Bits>(a, stream);
    if (error == nullptr) error = launch<SetArgs>(finish_kernel<X, P>, parameters, kThreads, stream, a);
    if (error == nullptr && fused != Operation::none) error = run_elementwise(fused, d.elements, stream);
    return error;
  });
}

}  // namespace
}  // namespace quantkit

