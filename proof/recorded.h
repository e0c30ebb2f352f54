// Calls of kernels in a file: what crosses the border (calls.h), with the memory before and after.
// The emulator of a development build writes them (proof/emu), the driver beside this runs them
// again.
#pragma once

#include <cstdio>
#include <vector>

#include "../csrc/calls.h"

namespace quantkit {
namespace recorded {

enum class Kind : int32_t { elementwise, dynamic, measure };

// The file begins with these; a driver whose structs are laid out otherwise refuses it.
constexpr int64_t kHeader[] = {0x33304b51,      sizeof(Elementwise), sizeof(Dynamic),
                               sizeof(Measure), sizeof(Measured),    sizeof(Dim)};

struct Call {
  Kind kind;
  Elementwise elementwise{};
  Dynamic dynamic{};
  Measure measure{};
  Layout layout{};

  explicit Call(Kind kind_) : kind(kind_) {}
  explicit Call(const Elementwise& e)
      : kind(Kind::elementwise), elementwise(e), layout(*e.layout) {}
  explicit Call(const Dynamic& d) : kind(Kind::dynamic), dynamic(d), layout(*d.elements.layout) {}
  explicit Call(const Measure& m) : kind(Kind::measure), measure(m), layout(*m.elements.layout) {}

  Elementwise& elements() {
    return kind == Kind::dynamic   ? dynamic.elements
           : kind == Kind::measure ? measure.elements
                                   : elementwise;
  }
};

// A pointer of a call: where it stands, what it points to and along which steps. `count` elements
// in memory are `per` of those that the layout counts, or of the only one.
struct Field {
  const void** pointer;
  Type type;
  Operand operand;
  bool written;
  int64_t count = 1, per = 1;
  bool only = false;

  // The bytes from the pointer on.
  int64_t bytes(const Layout& layout) const {
    int64_t last = only ? 0 : layout.offset[operand];
    for (int32_t k = 0; k < layout.count && !only; ++k)
      last += (layout.dims[k].size - 1) * layout.dims[k].stride[operand];
    return ((last + 1) * count + per - 1) / per * size_of(type);
  }
};

// The type of a code in memory.
inline Type stored_type(Format format) {
  return with_format(format, [](auto tag) {
    using Storage = typename decltype(tag)::type::Storage;
    constexpr bool kSigned = Storage(-1) < Storage(0);
    return sizeof(Storage) == 4   ? Type::f32
           : sizeof(Storage) == 2 ? (kSigned ? Type::i16 : Type::u16)
           : kSigned              ? Type::i8
                                  : Type::u8;
  });
}

template <class T>
const void** at(T*& pointer) {
  return reinterpret_cast<const void**>(const_cast<const T**>(&pointer));
}

inline std::vector<Field> fields_of(Call& call) {
  Elementwise& e = call.elements();
  const Operation o = e.operation;
  const Beside lies = route_of(o).beside;
  const Type beside = lies == Beside::gradient ? e.y_type
                      : lies == Beside::mask   ? Type::boolean
                                               : stored_type(e.format);
  // Codes that share a byte; pack and unpack count bytes, and have each code in one of its own.
  const bool packs = o == Operation::pack, unpacks = o == Operation::unpack;
  const bool share = packs || unpacks || (lies == Beside::codes && e.packed);
  const int64_t packed = share ? per_byte(e.format) : 1;
  const int64_t per = packs || unpacks ? 1 : packed;
  std::vector<Field> fields = {
      {&e.x, e.x_type, kX, false},
      {&e.q_in, beside, kQ, false, packs ? packed : 1, per},
      {at(e.q), beside, kQ, true, unpacks ? packed : 1, per},
      {at(e.y), e.y_type, kY, true},
      {&e.scale.data, e.scale.type, kScale, false},
      {&e.add.data, e.add.type, kZeroPoint, false},
      {&e.subtract.data, e.subtract.type, kZeroPoint, false},
  };
  if (call.kind == Kind::dynamic) {
    Dynamic& d = call.dynamic;
    fields.push_back({at(d.scale), d.p_type, kScale, true});
    fields.push_back({at(d.zero_point), d.p_type, kZeroPoint, true});
    const bool coded = d.scheme.stored != Stored::number;
    fields.push_back({at(d.stored), coded ? Type::u8 : Type::f32, kScale, true});
    fields.push_back({&d.global.data, d.global.type, kScale, false, 1, 1, !d.each_global});
  }
  fields.push_back({at(e.seed), Type::i64, kIndex, false, 2, 1, true});
  if (call.kind == Kind::measure)
    fields.push_back(
        {at(call.measure.blocks), Type::i64, kState, true, sizeof(Measured) / sizeof(int64_t)});
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
  const Layout& layout = call.layout;
  for (const Field& f : fields_of(call)) {
    index.push_back(-1);
    if (*f.pointer == nullptr) continue;
    const int64_t bytes = f.bytes(layout);
    size_t i = 0;
    while (i < buffers.size() && buffers[i].address != *f.pointer) ++i;
    if (i == buffers.size())
      buffers.push_back({*f.pointer,
                         int32_t(f.type),
                         0,
                         int32_t(reinterpret_cast<uintptr_t>(*f.pointer) % 64),
                         0,
                         {},
                         {}});
    if (buffers[i].bytes < bytes) buffers[i].bytes = bytes;
    buffers[i].written |= f.written;
    index.back() = int32_t(i);
  }
  return buffers;
}

// Calls f(address, bytes) for each plain part of a call, in the order of the file.
template <class F>
void parts_of(Call& call, F f) {
  if (call.kind == Kind::elementwise) f(&call.elementwise, sizeof(Elementwise));
  if (call.kind == Kind::dynamic) f(&call.dynamic, sizeof(Dynamic));
  if (call.kind == Kind::measure) f(&call.measure, sizeof(Measure));
  Layout& layout = call.layout;
  f(&layout.count, sizeof(layout.count));
  f(&layout.numel, sizeof(layout.numel));
  f(layout.offset, sizeof(layout.offset));
  f(layout.dims, size_t(layout.count) * sizeof(Dim));
  call.elements().layout = &layout;
}

}  // namespace recorded
}  // namespace quantkit
