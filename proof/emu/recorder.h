// Writes every call of the emulated kernels to the file that QUANTKIT_EMU_RECORD names.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../recorded.h"

namespace quantkit {
namespace recorded {

class Recorder {
 public:
  Recorder(Kind kind, Operation operation) : call_{kind, operation} {}

  template <class Struct, class Run>
  const char* run(const Struct& given, Struct Call::*member, Run run_call) {
    std::FILE* const file = opened();
    if (file == nullptr) return run_call();
    call_.*member = given;
    std::vector<int32_t> index;
    std::vector<Buffer> buffers = buffers_of(call_, index);
    for (Buffer& b : buffers) b.before = contents(b);
    const char* const error = run_call();
    const auto put = [file](const void* from, size_t bytes) {
      if (std::fwrite(from, 1, bytes, file) != bytes) throw std::runtime_error("QUANTKIT_EMU_RECORD: cannot write");
    };
    put(&call_.kind, sizeof(Kind));
    put(&call_.operation, sizeof(Operation));
    std::vector<Level> levels[2];
    const Shape shapes[] = {shape_of(call_), call_.dynamic.parameters};
    for (int i = 0; i < 2; ++i) levels[i].assign(shapes[i].levels, shapes[i].levels + shapes[i].count);
    parts_of(call_, levels, put);
    put(index.data(), index.size() * sizeof(int32_t));
    const int64_t count = int64_t(buffers.size());
    put(&count, sizeof(count));
    for (const Buffer& b : buffers) {
      const int32_t facts[] = {b.type, b.written, b.alignment};
      put(facts, sizeof(facts));
      put(&b.bytes, sizeof(b.bytes));
      put(b.before.data(), b.before.size());
      if (b.written != 0) put(contents(b).data(), b.before.size());
    }
    std::fflush(file);
    return error;
  }

 private:
  static std::FILE* opened() {
    static std::FILE* const file = open();
    return file;
  }
  static std::FILE* open() {
    const char* const name = std::getenv("QUANTKIT_EMU_RECORD");
    if (name == nullptr) return nullptr;
    std::FILE* const file = std::fopen(name, "wb");
    if (file == nullptr || std::fwrite(kHeader, sizeof(kHeader), 1, file) != 1)
      throw std::runtime_error(std::string("QUANTKIT_EMU_RECORD: cannot write ") + name);
    return file;
  }
  static std::vector<char> contents(const Buffer& b) {
    const char* const from = static_cast<const char*>(b.address);
    return std::vector<char>(from, from + b.bytes);
  }

  Call call_;
};

}  // namespace recorded
}  // namespace quantkit
