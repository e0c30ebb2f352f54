// What crosses the border between torch and the kernels: plain structs and tables of functions. No
// torch.
#pragma once

#include "layout.h"
#include "numerics/affine.h"
#include "numerics/formats.h"
#include "numerics/scales.h"
#include "numerics/sums.h"

namespace quantkit {

struct Parameter {
  const void* data;
  Type type;     // any floating type: loops convert what they load
  bool on_host;  // one value in the host's memory, where x is on a GPU
};

// Operand:               kX         kQ              kY
enum class Operation : int32_t {
  quantize,                // x         q out
  dequantize,              //           q in            y
  quantize_dequantize,     // x         q out           y
  fake_quantize,           // x                         y
  fake_quantize_masked,    // x         mask out        y
  fake_quantize_backward,  // x         gradient in     y
  masked_gradient,         // gradient  mask in         y
  convert,                 // x of any real type        y of any floating one
  pack,                    // codes in  bytes out, each with all of its codes
  unpack,                  // bytes in  codes out
  measure,                 // x, and sums of its errors
  choose                   // x, parameters alone
};

// What an operation does: the way from x to codes, the way from codes to y, what lies at kQ.
enum class Beside { nothing, codes, mask, gradient, outside };
struct Route {
  bool there, back;
  Beside beside;
};

namespace {

QK_INLINE constexpr Route route_of(Operation operation) {
  switch (operation) {
    case Operation::quantize: return {true, false, Beside::codes};
    case Operation::dequantize: return {false, true, Beside::codes};
    case Operation::quantize_dequantize: return {true, true, Beside::codes};
    case Operation::fake_quantize: return {true, true, Beside::nothing};
    case Operation::fake_quantize_masked: return {true, true, Beside::mask};
    case Operation::fake_quantize_backward: return {true, true, Beside::gradient};
    case Operation::masked_gradient: return {false, false, Beside::mask};
    case Operation::measure: return {true, true, Beside::outside};
    case Operation::convert:
    case Operation::choose: return {false, false, Beside::nothing};
    case Operation::pack:
    case Operation::unpack: return {false, false, Beside::codes};
  }
  __builtin_unreachable();
}

// Bytes of an element at kQ.
[[maybe_unused]] int64_t size_beside(Operation operation, Format format, Type y_type) {
  switch (route_of(operation).beside) {
    case Beside::gradient: return size_of(y_type);
    case Beside::mask:
    case Beside::outside: return 1;
    case Beside::codes:
    case Beside::nothing: return size_of(format);
  }
  __builtin_unreachable();
}

}  // namespace

struct Elementwise {
  Operation operation;
  const Layout* layout;
  const void* x;
  const void* q_in;
  void* q;
  void* y;
  Type x_type, y_type;
  Format format;
  bool packed;  // codes share bytes, where the format has several a byte
  Parameter scale;
  Parameter add, subtract;  // zero_point of each direction: integer ones are rounded differently
  Steps steps;
  int32_t q_min, q_max;
  bool powers;       // scales are powers of two, or NaN
  bool chosen;       // scale and zero_point come from x itself,
  bool centred;      // so that max |x| becomes q_max, and the zero point is 0
  bool nontemporal;  // outputs are large and not expected in a cache: write past it
  // Where codes are rounded randomly: seed and stream, in the host's memory or x's (null: they are
  // not); the index of the layout's first element, whose kIndex has the others' places.
  const int64_t* seed;
  bool seed_on_host;
  int64_t first_index;
};

// Parameters chosen from x, then `elements` with them.
struct Dynamic {
  Elementwise elements;
  const Layout* reduced;     // what parameters are chosen from
  const Layout* parameters;  // each of them once
  void* scale;               // as the steps use it
  void* zero_point;          // null: there is none
  Type p_type;               // of both: x's, or f32
  // Where a scale is stored as another number than the steps use (null: it is not), with the
  // strides of `scale`, which is then null if no step is taken; and what it was divided by: as
  // many, or one (each false).
  void* stored;
  Parameter global;
  bool each_global;
  Scheme scheme;
};

// The errors of x by given parameters, added to what was measured of each block before. The layout's
// kState says which block an element belongs to.
struct Measure {
  Elementwise elements;
  Measured* blocks;
};

// A linear layer of int8 codes: y = (x · q transposed) times both scales, plus bias.
struct Linear {
  int64_t tokens, outputs, depth;
  const int8_t* x;  // (tokens, depth), with a scale for each token
  const float* x_scale;
  const int8_t* q;  // (outputs, depth), with a scale for each row or one
  const float* scale;
  bool each_scale;
  const float* bias;  // null: none
  void* y;            // (tokens, outputs)
  Type y_type;
  const int32_t* sums;  // the exact products, rows `sums_stride` apart: for a GPU alone
  int64_t sums_stride;
};

// The states of the parameters [first, first + count): each key in an array of its own.
struct States {
  void* keys;
  int64_t first, count;
};

// In tasks of any split.
struct LinearTable {
  int64_t (*tasks)(const Linear&);
  void (*run)(const Linear&, int64_t begin, int64_t end);
};

// One table per instruction set. Ranges count elements (or parameters) in the layout's order, and
// any split of the work gives the same bits.
struct KernelTable {
  void (*elementwise)(const Elementwise&, int64_t begin, int64_t end);
  int64_t (*state_bytes)(const Dynamic&);
  void (*first_states)(const Dynamic&, const States&);
  void (*reduce)(const Dynamic&, int64_t begin, int64_t end, const States&);
  void (*join)(const Dynamic&, const States& to, const States& from);
  void (*finalize)(const Dynamic&, int64_t begin, int64_t end, const States&);
  // Of elements of one block, in a layout without the others; at most 2^28 of them.
  void (*measure)(const Elementwise&, int64_t begin, int64_t end, Measured&);
  LinearTable linear;
};

// The CUDA kernels. A call puts its work on a stream of the current device, and returns what went
// wrong, or nullptr. The scratch of `dynamic` may be freed, in the stream's order, when the call
// returns.
struct LaunchTable {
  const char* (*elementwise)(const Elementwise&, void* stream);
  int64_t (*scratch_bytes)(const Dynamic&);
  const char* (*dynamic)(const Dynamic&, void* scratch, void* stream);
  const char* (*measure)(const Measure&, void* stream);
  const char* (*finish)(const Measured*, int64_t count, const MeasuredOut&, void* stream);
  const char* (*linear)(const Linear&, void* stream);
};

}  // namespace quantkit
