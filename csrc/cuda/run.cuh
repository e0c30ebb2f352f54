// From the structs of calls.h to launches: which kernel, how many threads for what.
#pragma once

#include <type_traits>

#include "../cpu/fpenv.h"
#include "dynamic.cuh"
#include "linear.cuh"
#include "measure.cuh"
#include "mixed.cuh"
#ifndef QUANTKIT_EMULATE
#include "launch.h"
#endif

namespace quantkit {
namespace {

int64_t power_of_two_from(int64_t n, int64_t most) {
  int64_t power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

int64_t blocks_for(int64_t wanted) {
  const int64_t most = multiprocessors() * kBlocksPerProcessor;
  return wanted < most ? wanted : most;
}

// Rows of n elements in vectors of `width`: how many vectors a row takes at most, one more where
// some rows begin between two aligned addresses, and whether some vectors are not whole. The rows
// begin at `data`, and the steps of `dims` lie between them.
struct Vectors {
  int64_t count;
  bool ragged;
};
template <class Args>
Vectors vectors_of(const void* data, int64_t size, Operand o, const Args& a, int count,
                   const Dim& row, int64_t width) {
  const Dim* const dims = a.dims;
  const int64_t n = row.size;
  if (row.stride[o] != 1) return {divided_up(n, width), true};
  bool aligned = (reinterpret_cast<uintptr_t>(data) + a.start.of[o] * size) % (size * width) == 0;
  for (int k = 0; k < count; ++k) aligned &= dims[k].size == 1 || dims[k].stride[o] % width == 0;
  return {divided_up(n + (aligned ? 0 : width - 1), width), !aligned || n % width != 0};
}

// ---- elementwise --------------------------------------------------------------------------------

// `step` is the type that a step rounds the parameter to first, where it does.
Values values_of(const Parameter& p, Type step = Type::f64) {
  Values n{p.data, 0, p.type};
  if (p.on_host) {
    // The caller's environment must not flush a denormal or round otherwise.
    FloatingPointGuard guard;
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

template <class Args>
void fill_start(Args& a, const Layout& layout) {
  for (int o = 0; o < kOperands; ++o) a.start.of[o] = layout.offset[o];
}

// The innermost dimension becomes the row; around it there is one at least.
void fill_rows(ElementwiseArgs& a, const Layout& layout) {
  const Dim& inner = layout.dims[layout.count - 1];
  fill_start(a, layout);
  a.count = layout.count > 1 ? layout.count - 1 : 1;
  a.dims[0] = Dim{1, {}};
  for (int k = 0; k + 1 < layout.count; ++k) a.dims[k] = layout.dims[k];
  a.rows = layout.numel / inner.size;
  a.n = inner.size;
  for (int o = 0; o < kOperands; ++o) a.stride[o] = inner.stride[o];
}

// Teams for rows in vectors, of which a thread takes `each`; the number of teams.
int64_t fill_teams(ElementwiseArgs& a, int64_t vectors, int each) {
  const int64_t threads = divided_up(vectors, each);
  a.team = static_cast<int32_t>(power_of_two_from(threads, threads > 4 * kWarp ? kThreads : kWarp));
  a.parts = divided_up(threads, a.team);
  return a.rows * a.parts;
}

// The same where each element has its own parameters: rows that share them are taken together, as
// many as leave enough teams.
int64_t fill_columns(ElementwiseArgs& a, int64_t vectors) {
  constexpr int64_t kMostRows = 64;
  a.team = static_cast<int32_t>(power_of_two_from(vectors, kWarp));
  a.parts = divided_up(vectors, a.team);
  const Dim& around = a.dims[a.count - 1];
  a.height = 1;
  if (around.stride[kScale] == 0 && around.stride[kZeroPoint] == 0) {
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
  return each ? quantize_kernel<X, D, IntegerEncoder, kResult, true>
              : quantize_kernel<X, D, IntegerEncoder, kResult, false>;
}

// Whether parameters that are many have the type of the steps.
bool have_type(const Elementwise& e, Type type, bool back) {
  const auto has = [&](const Parameter& p) { return p.on_host || p.type == type; };
  return has(e.scale) && has(e.add) && (!back || has(e.subtract));
}

// Null where the types of the steps are mixed, or y is not as kernels make it.
template <Result kResult>
ElementwiseKernel quantize_kernel_of(const Elementwise& e, bool each) {
  const Type step = e.steps.divide;
  const bool back = e.y != nullptr;
  if (!e.steps.there_in(step) || (back && !e.steps.back_in(Type::f32))) return nullptr;
  if ((each && !have_type(e, step, back)) || e.steps.round_first || e.seed != nullptr)
    return nullptr;
  if (kResult == Result::codes && back && e.y_type != Type::f32) return nullptr;
  if (is_float(e.format)) {
    if (each) return nullptr;  // rare, and each kernel costs seconds of every build
    switch (e.x_type) {
      case Type::f16: return quantize_kernel<f16, float, FloatEncoder, kResult, false>;
      case Type::bf16: return quantize_kernel<bf16, float, FloatEncoder, kResult, false>;
      case Type::f32: return quantize_kernel<float, float, FloatEncoder, kResult, false>;
      default: return nullptr;
    }
  }
  if (step == e.x_type) {
    switch (e.x_type) {
      case Type::f16: return quantize_kernel_of<kResult, f16, f16>(each);
      case Type::bf16: return quantize_kernel_of<kResult, bf16, bf16>(each);
      case Type::f32: return quantize_kernel_of<kResult, float, float>(each);
      default: return nullptr;
    }
  }
  if (step != Type::f32 || !is_half(e.x_type)) return nullptr;
  return e.x_type == Type::f16 ? quantize_kernel_of<kResult, f16, float>(each)
                               : quantize_kernel_of<kResult, bf16, float>(each);
}

ElementwiseKernel dequantize_kernel_of(const Elementwise& e, bool each) {
  if (!e.steps.back_in(Type::f32) || e.y_type != Type::f32) return nullptr;
  if (e.format == Format::numbers || e.format == Format::powers) return nullptr;
  if (each && !have_type(e, Type::f32, true)) return nullptr;
  return with_codes(e.format, [&](auto tag) -> ElementwiseKernel {
    using F = typename decltype(tag)::type;
    if constexpr (F::kPerByte == 1 || !F::kInteger)
      return each ? dequantize_kernel<F, true> : dequantize_kernel<F, false>;
    else  // unpacked before
      return each ? dequantize_kernel<IntegerFormat<int8_t>, true>
                  : dequantize_kernel<IntegerFormat<int8_t>, false>;
  });
}

struct KernelChoice {
  ElementwiseKernel typed, mixed;  // typed: null where the dtypes of the steps are mixed
};
KernelChoice choice_of(const Elementwise& e, bool each) {
  switch (e.operation) {
    case Operation::quantize:
    case Operation::quantize_dequantize:
      return {quantize_kernel_of<Result::codes>(e, each), quantize_mixed_kernel};
    case Operation::fake_quantize:
    case Operation::fake_quantize_masked:
      return {quantize_kernel_of<Result::fake>(e, each), quantize_mixed_kernel};
    case Operation::fake_quantize_backward: return {nullptr, quantize_mixed_kernel};
    case Operation::dequantize: return {dequantize_kernel_of(e, each), dequantize_mixed_kernel};
    case Operation::masked_gradient: return {nullptr, masked_gradient_kernel};
    case Operation::convert:
      return {nullptr, with_float(e.y_type, [](auto tag) -> ElementwiseKernel {
                return convert_kernel<typename decltype(tag)::type>;
              })};
    case Operation::pack: return {nullptr, repack_kernel<true>};
    case Operation::unpack: return {nullptr, repack_kernel<false>};
    case Operation::measure:
    case Operation::choose: break;
  }
  return {nullptr, nullptr};
}

// All but the geometry.
void fill_call(ElementwiseArgs& a, const Elementwise& e) {
  a.x = e.x;
  a.q_in = e.q_in;
  a.q = e.q;
  a.y = e.y;
  a.scale = values_of(e.scale);
  a.add = values_of(e.add, e.steps.add);
  a.subtract = values_of(e.subtract);
  a.operation = e.operation;
  a.x_type = e.x_type;
  a.y_type = e.y_type;
  a.format = e.format;
  a.code_bytes = size_of(e.format);
  a.steps = e.steps;
  a.q_min = e.q_min;
  a.q_max = e.q_max;
  a.draws_randomly = e.seed != nullptr;
  a.first_index = e.first_index;
  if (e.seed_on_host && e.seed != nullptr)
    a.draws = {uint64_t(e.seed[0]), uint64_t(e.seed[1])};
  else
    a.seed = e.seed;
}

const char* run_elementwise(const Elementwise& e, void* stream) {
  const Layout& layout = *e.layout;
  ElementwiseArgs a{};
  fill_rows(a, layout);
  fill_call(a, e);
  const bool each = a.stride[kScale] != 0 || a.stride[kZeroPoint] != 0;
  const KernelChoice choice = choice_of(e, each);
  int64_t teams;
  if (choice.typed == nullptr) {
    teams = fill_teams(a, a.n, kMixedRun);
  } else {
    const Operand lead = e.operation == Operation::dequantize ? kY : kX;
    const int64_t size = size_of(lead == kY ? Type::f32 : e.x_type);
    const Vectors v = vectors_of(lead == kY ? e.y : e.x, size, lead, a, a.count,
                                 layout.dims[layout.count - 1], kVectorBytes / size);
    a.ragged = v.ragged;
    teams = each ? fill_columns(a, v.count) : fill_teams(a, v.count, kUnroll);
  }
  const int64_t blocks = blocks_for(divided_up(teams, kThreads / a.team));
  return launch(choice.typed != nullptr ? choice.typed : choice.mixed, blocks, kThreads, stream, a);
}

// ---- choosing parameters ------------------------------------------------------------------------

using SetKernel = void (*)(SetArgs);

// Dimensions along which `o` steps from set to set first, then those within a set.
template <class Args>
void fill_dims(Args& a, const Layout& layout, Operand o, int32_t& outer, int64_t& sets,
               int64_t& n) {
  fill_start(a, layout);
  a.count = 0;
  sets = n = 1;
  for (const bool is_outer : {true, false}) {
    int64_t& product = is_outer ? sets : n;
    const int before = a.count;
    for (int k = 0; k < layout.count; ++k) {
      if ((layout.dims[k].stride[o] != 0) != is_outer) continue;
      product *= layout.dims[k].size;
      a.dims[a.count++] = layout.dims[k];
    }
    if (a.count == before) a.dims[a.count++] = Dim{1, {}};
    if (is_outer) outer = a.count;
  }
}
void fill_sets(SetArgs& a, const Layout& layout) {
  fill_dims(a, layout, kScale, a.outer, a.sets, a.n);
}

// As many parts of each of `sets` as fill the device, of no fewer elements than `least`.
int64_t parts_of(int64_t n, int64_t least, int64_t sets) {
  const int64_t wanted = divided_up(n, least);
  const int64_t most = divided_up(multiprocessors() * kBlocksPerProcessor / 4, sets);
  return wanted < most ? wanted : most;
}

template <class X>
void fill_vectors(SetArgs& a, int row, int outer) {
  const Vectors v = vectors_of(a.x, sizeof(X), kX, a, outer, a.dims[row], kVectorBytes / sizeof(X));
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
  const SetKernel kernel = with_reduction<X>(
      a.scheme, [](auto tag) -> SetKernel { return rows_kernel<X, typename decltype(tag)::type>; });
  return launch(kernel, blocks, block, stream, a);
}

template <class X>
const char* run_reduce(SetArgs& a, void* stream) {
  constexpr int kWidth = kVectorBytes / sizeof(X);
  a.parts = parts_of(a.n, int64_t(kThreads) * kUnroll * kWidth, a.sets);
  const SetKernel kernel = with_reduction<X>(a.scheme, [](auto tag) -> SetKernel {
    return reduce_kernel<X, typename decltype(tag)::type>;
  });
  return launch(kernel, blocks_for(a.sets * a.parts), kThreads, stream, a);
}

template <class X>
const char* run_columns(SetArgs& a, void* stream) {
  fill_vectors<X>(a, a.outer - 1, a.outer - 1);
  a.team = static_cast<int32_t>(power_of_two_from(a.vectors, kWarp));
  const int64_t pieces = a.sets / a.dims[a.outer - 1].size * divided_up(a.vectors, a.team);
  a.parts = parts_of(a.n, int64_t(kThreads / a.team) * 16, pieces);
  const SetKernel kernel = with_reduction<X>(a.scheme, [](auto tag) -> SetKernel {
    return columns_kernel<X, typename decltype(tag)::type>;
  });
  return launch(kernel, blocks_for(pieces * a.parts), kThreads, stream, a);
}

// Calls f with the tags of x's type and of the parameters': the same, or float.
template <class F>
auto with_set_types(const SetArgs& a, F f) {
  return with_float(a.x_type, [&](auto x) {
    if constexpr (sizeof(typename decltype(x)::type) != 4)
      if (a.p_type == Type::f32) return f(x, Tag<float>());
    return f(x, x);
  });
}

// Whether neighbours in memory belong to different sets.
bool has_columns(const Layout& layout) { return layout.dims[layout.count - 1].stride[kScale] != 0; }

bool takes_rows(const SetArgs& a, const Dynamic& d) {
  if (has_columns(*d.elements.layout) || a.count - a.outer > 1) return false;
  const Elementwise& e = d.elements;
  if (e.x_type == Type::f64 || d.p_type != e.x_type) return false;
  if (is_float(e.format) || e.steps.round_first || e.seed != nullptr || d.stored != nullptr)
    return false;
  if (e.operation == Operation::quantize_dequantize && e.y_type != Type::f32) return false;
  // Few sets must be split to fill the device, where they are more than a block holds in registers.
  const int64_t held = int64_t(kMostThreads) * kHeld * kVectorBytes / size_of(e.x_type);
  return a.n <= held || a.sets >= 2 * multiprocessors();
}

// States of all parameters, where they are not kept in registers.
int64_t scratch_bytes(const Dynamic& d) {
  SetArgs a{};
  fill_sets(a, *d.elements.layout);
  const int64_t keys = d.scheme.symmetric ? 1 : 2, bytes = d.elements.x_type == Type::f64 ? 8 : 4;
  return takes_rows(a, d) ? 0 : keys * bytes * d.parameters->numel;
}

const char* run_dynamic(const Dynamic& d, void* scratch, void* stream) {
  const Operation fused = d.elements.operation;
  SetArgs a{};
  fill_sets(a, *d.elements.layout);
  a.scheme = d.scheme;
  a.x = d.elements.x;
  a.q = d.elements.q;
  a.y = d.elements.y;
  a.scale = d.scale;
  a.zero_point = d.zero_point;
  a.stored = d.stored;
  a.global = values_of(d.global);
  a.each_global = d.each_global;
  a.keys = scratch;
  a.x_type = d.elements.x_type;
  a.p_type = d.p_type;
  a.code_bytes = size_of(d.elements.format);
  if (takes_rows(a, d)) {
    switch (a.x_type) {
      case Type::f16: return run_rows<f16>(a, stream);
      case Type::bf16: return run_rows<bf16>(a, stream);
      default: return run_rows<float>(a, stream);
    }
  }
  fill_sets(a, *d.reduced);
  const Dim& inner = a.dims[a.count - 1];
  const int width = kVectorBytes / static_cast<int>(size_of(a.x_type));
  a.gathers = a.count - a.outer > 1 && inner.size % width != 0;
  const bool columns = has_columns(*d.reduced);
  const int64_t parameters = blocks_for(divided_up(a.sets, kThreads));
  return with_set_types(a, [&](auto x, auto p) -> const char* {
    using X = typename decltype(x)::type;
    using P = typename decltype(p)::type;
    // Keys are made of bits alone: one kernel serves all types of 16.
    using Bits = typename std::conditional<sizeof(X) == 2, f16, X>::type;
    const SetKernel clear = with_reduction<Bits>(a.scheme, [](auto tag) -> SetKernel {
      return clear_kernel<Bits, typename decltype(tag)::type>;
    });
    const SetKernel finalize = with_reduction<X>(a.scheme, [](auto tag) -> SetKernel {
      return finalize_kernel<X, P, typename decltype(tag)::type>;
    });
    const char* error = launch(clear, parameters, kThreads, stream, a);
    if (error == nullptr)
      error = columns ? run_columns<Bits>(a, stream) : run_reduce<Bits>(a, stream);
    if (error == nullptr) error = launch(finalize, parameters, kThreads, stream, a);
    if (error == nullptr && fused != Operation::choose) error = run_elementwise(d.elements, stream);
    return error;
  });
}

// ---- measuring ----------------------------------------------------------------------------------

const char* run_measure(const Measure& m, void* stream) {
  constexpr int64_t kLeast = 16 * kThreads;  // elements of a block: its sums take as long as some
  MeasureArgs a{};
  fill_call(a.e, m.elements);
  fill_dims(a.e, *m.elements.layout, kState, a.outer, a.sets, a.n);
  a.e.n = 1;
  a.parts = parts_of(a.n, kLeast, a.sets);
  a.each = divided_up(a.n, a.parts);
  a.measured = m.blocks;
  const auto kernel =
      is_float(m.elements.format) ? measure_kernel<FloatEncoder> : measure_kernel<IntegerEncoder>;
  return launch(kernel, blocks_for(a.sets * a.parts), kThreads, stream, a);
}

const char* run_linear(const Linear& l, void* stream) {
  const auto kernel = with_float(l.y_type, [](auto tag) -> void (*)(Linear) {
    return linear_kernel<typename decltype(tag)::type>;
  });
  return launch(kernel, blocks_for(divided_up(l.tokens * l.outputs, kThreads)), kThreads, stream,
                l);
}

const char* run_finish(const Measured* measured, int64_t count, const MeasuredOut& out,
                       void* stream) {
  const FinishArgs a{measured, count, out};
  return launch(finish_kernel, blocks_for(divided_up(count, kThreads)), kThreads, stream, a);
}

}  // namespace
}  // namespace quantkit
