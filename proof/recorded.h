// Calls of kernels in a file: what crosses the border (kernels.h), with the memory before and after. The
// emulator of a development build writes them (proof/emu), the driver beside this runs them again.
#pragma once

#include <cstdio>
#include <vector>

#include "../csrc/kernels.h"

namespace quantkit {
namespace recorded {

enum class Kind : int32_t { elementwise, dynamic, conversion };

// The file begins with these; a driver whose structs are laid out otherwise refuses it.
constexpr int64_t kHeader[] = {0x31304b51, sizeof(Elementwise), sizeof(Dynamic), sizeof(Conversion), sizeof(Level)};

struct Call {
  Kind kind;
  Operation operation;  // the fused one, where kind is dynamic
  Elementwise elementwise{};
  Dynamic dynamic{};
  Conversion conversion{};
};

// A pointer of a call: where it stands, what it points to and along which steps.
struct Field {
  const void** pointer;
  Type type;
  Operand operand;
  bool written;
};

inline const void** at(void*& pointer) { return const_cast<const void**>(&pointer); }

inline Shape& shape_of(Call& call) {
  return call.kind == Kind::elementwise ? call.elementwise.shape
         : call.kind == Kind::dynamic   ? call.dynamic.elements.shape
                                        : call.conversion.shape;
}

inline std::vector<Field> fields_of(Call& call) {
  if (call.kind == Kind::conversion) {
    Conversion& c = call.conversion;
    return {{&c.x, c.x_type, kX, false}, {at(c.y), c.y_type, kY, true}};
  }
  Elementwise& e = call.kind == Kind::dynamic ? call.dynamic.elements : call.elementwise;
  std::vector<Field> fields = {
      {&e.x, e.x_type, kX, false},
      // What comes in beside x is a gradient in y's type.
      {&e.q_in, e.x != nullptr ? e.y_type : e.q_type, kQ, false},
      {at(e.q), e.q_type, kQ, true},
      {at(e.y), e.y_type, kY, true},
      {&e.scale.data, e.scale.type, kScale, false},
      {&e.add_zero_point.data, e.add_zero_point.type, kZeroPoint, false},
      {&e.subtract_zero_point.data, e.subtract_zero_point.type, kZeroPoint, false},
  };
  if (call.kind == Kind::dynamic) {
    Dynamic& d = call.dynamic;
    fields.push_back({at(d.scale), d.p_type, kScale, true});
    fields.push_back({at(d.zero_point), d.p_type, kScale, true});
  }
  return fields;
}

// Memory that one or more pointers begin at.
struct Buffer {
  const void* address;  // while it is recorded
  int32_t type, written, alignment;
  int64_t bytes;
  std::vector<char> before, after;
};

// The memory of a call, and the index of each field's (-1: null).
inline std::vector<Buffer> buffers_of(Call& call, std::vector<int32_t>& index) {
  std::vector<Buffer> buffers;
  const Shape shape = shape_of(call);
  for (const Field& f : fields_of(call)) {
    index.push_back(-1);
    if (*f.pointer == nullptr) continue;
    int64_t last = 0;
    for (int32_t k = 0; k < shape.count; ++k)
      last += (shape.levels[k].size - 1) * shape.levels[k].step[f.operand];
    const int64_t bytes = (last + 1) * size_of(f.type);
    size_t i = 0;
    while (i < buffers.size() && buffers[i].address != *f.pointer) ++i;
    if (i == buffers.size())
      buffers.push_back({*f.pointer, int32_t(f.type), 0, int32_t(reinterpret_cast<uintptr_t>(*f.pointer) % 64), 0, {}, {}});
    if (buffers[i].bytes < bytes) buffers[i].bytes = bytes;
    buffers[i].written |= f.written;
    index.back() = int32_t(i);
  }
  return buffers;
}

// Calls f(address, bytes) for each plain part of a call, in the order of the file.
template <class F>
void parts_of(Call& call, std::vector<Level> levels[2], F f) {
  if (call.kind == Kind::elementwise) f(&call.elementwise, sizeof(Elementwise));
  if (call.kind == Kind::dynamic) f(&call.dynamic, sizeof(Dynamic));
  if (call.kind == Kind::conversion) f(&call.conversion, sizeof(Conversion));
  levels[0].resize(shape_of(call).count);
  f(levels[0].data(), levels[0].size() * sizeof(Level));
  if (call.kind != Kind::dynamic) return;
  levels[1].resize(call.dynamic.parameters.count);
  f(levels[1].data(), levels[1].size() * sizeof(Level));
}

}  // namespace recorded
}  // namespace quantkit
