// What crosses the border between torch and the kernels: plain structs and a table of functions. No torch.
#pragma once

#include <cstdint>

#include "numerics.h"

namespace quantkit {

// Storage types.
enum class Type : int32_t { f16, bf16, f32, f64, i8, u8, i16, u16, i32, u32, i64, u64, boolean };

namespace {
[[maybe_unused]] constexpr int64_t size_of(Type type) {
  switch (type) {
    case Type::i8:
    case Type::u8:
    case Type::boolean: return 1;
    case Type::f16:
    case Type::bf16:
    case Type::i16:
    case Type::u16: return 2;
    case Type::f64:
    case Type::i64:
    case Type::u64: return 8;
    default: return 4;
  }
}
}  // namespace

// A tensor of any shape and strides with parameters of any granularity is a list of levels, outermost
// first: sizes, and for each operand the step in elements from one index to the next (0: shared).
// Neighbours that share a rule are merged, so most tensors have one or two.
enum Operand : int { kX, kQ, kY, kScale, kZeroPoint, kOperands };

struct Level {
  int64_t size;
  int64_t step[kOperands];
};

// At least one level; where there are more, each has at least two elements, and the product of all is
// below 2^63.
constexpr int kMaxLevels = 64;

struct Shape {
  const Level* levels;
  int32_t count;
  int64_t numel;
};

struct Parameter {
  const void* data;
  Type type;     // any floating type: loops convert what they load
  bool on_host;  // one value in the host's memory, where x is on a GPU
};

enum class Operation : int32_t {
  none,
  quantize,
  dequantize,
  quantize_dequantize,
  fake_quantize,
  fake_quantize_backward
};

// quantize: x -> q. dequantize: q -> y. fake_quantize: x -> y. Its gradient: x and the gradient q -> y.
struct Elementwise {
  Shape shape;
  const void* x;
  const void* q_in;
  void* q;
  void* y;
  Type x_type, q_type, y_type;
  Parameter scale;
  Parameter add_zero_point, subtract_zero_point;  // one layout; integer ones are rounded differently
  Type divide_type, add_type;      // of the two steps of quantize
  Type subtract_type, scale_type;  // of the two steps of dequantize: f32 or f64
  int32_t q_min, q_max;
  bool chosen, symmetric;  // scale and zero_point come from x itself, by this scheme
  bool streams;            // outputs are large and not expected in a cache: write past it
};

// choose_qparams and the operators fused with it. While a reduction runs, the arrays of the results
// hold its keys: low in zero_point, high in scale (see numerics.h).
struct Dynamic {
  Elementwise elements;  // x and, for the fused operators, q and y; their parameters are the results
  Shape parameters;      // only the levels that step from parameter to parameter, step kScale
  void* scale;
  void* zero_point;
  Type p_type;  // of the results: x's, or f32
  Scheme scheme;
};

// Limits one level of a shape to [begin, end).
struct Part {
  int32_t level;  // -1: all of the shape
  int64_t begin, end;
};

// Any real type to a floating one: x -> y.
struct Conversion {
  Shape shape;
  const void* x;
  void* y;
  Type x_type, y_type;
};

// One table per instruction set. Ranges count elements (or parameters) in the shape's order, and any
// split of the work gives the same bits.
struct KernelTable {
  void (*quantize)(const Elementwise&, int64_t begin, int64_t end);
  void (*dequantize)(const Elementwise&, int64_t begin, int64_t end);
  void (*quantize_dequantize)(const Elementwise&, int64_t begin, int64_t end);
  void (*fake_quantize)(const Elementwise&, int64_t begin, int64_t end);
  void (*fake_quantize_backward)(const Elementwise&, int64_t begin, int64_t end);
  void (*convert)(const Conversion&, int64_t begin, int64_t end);
  void (*clear_keys)(const Dynamic&, int64_t begin, int64_t end, void* low, void* high);
  void (*reduce)(const Dynamic&, Part, int64_t begin, int64_t end, void* low, void* high);
  void (*join_keys)(const Dynamic&, const void* low, const void* high);  // into the results' arrays
  void (*finish)(const Dynamic&, int64_t begin, int64_t end);            // keys to parameters
};

// The CUDA kernels. A call puts its work on a stream of the current device, and returns what went wrong, or
// nullptr. The scratch of `dynamic` may be freed, in the stream's order, when the call returns.
struct LaunchTable {
  const char* (*elementwise)(Operation, const Elementwise&, void* stream);
  int64_t (*scratch_bytes)(const Dynamic&);
  const char* (*dynamic)(const Dynamic&, Operation fused, void* scratch, void* stream);
  const char* (*convert)(const Conversion&, void* stream);
};

// What stands for a type in generic code.
template <class T>
struct Tag {
  using type = T;
};

namespace {

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of a floating type.
template <class F>
QK_INLINE auto with_float(Type type, F f) {
  switch (type) {
    case Type::f16: return f(Tag<f16>());
    case Type::bf16: return f(Tag<bf16>());
    case Type::f64: return f(Tag<double>());
    default: return f(Tag<float>());
  }
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// Calls f with the tag of any type.
template <class F>
QK_INLINE auto with_real(Type type, F f) {
  switch (type) {
    case Type::i8: return f(Tag<int8_t>());
    case Type::u8: return f(Tag<uint8_t>());
    case Type::i16: return f(Tag<int16_t>());
    case Type::u16: return f(Tag<uint16_t>());
    case Type::i32: return f(Tag<int32_t>());
    case Type::u32: return f(Tag<uint32_t>());
    case Type::i64: return f(Tag<int64_t>());
    case Type::u64: return f(Tag<uint64_t>());
    case Type::boolean: return f(Tag<boolean>());
    default: return with_float(type, f);
  }
}

}  // namespace
}  // namespace quantkit
