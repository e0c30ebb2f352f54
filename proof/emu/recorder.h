// Writes every call of the emulated kernels to the file that QUANTKIT_EMU_RECORD names.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../recorded.h"

namespace quantkit {
namespace recorded {

inline std::FILE* open_record() {
  const char* const name = std::getenv("QUANTKIT_EMU_RECORD");
  if (name == nullptr) return nullptr;
  std::FILE* const file = std::fopen(name, "wb");
  if (file == nullptr || std::fwrite(kHeader, sizeof(kHeader), 1, file) != 1)
    throw std::runtime_error(std::string("QUANTKIT_EMU_RECORD: cannot write ") + name);
  return file;
}

// One file for calls of every kind; null: nothing is recorded.
inline std::FILE* record_file() {
  static std::FILE* const file = open_record();
  return file;
}

inline std::vector<char> contents(const Buffer& b) {
  const char* const from = static_cast<const char*>(b.address);
  return std::vector<char>(from, from + b.bytes);
}

// Runs a call, and writes it with the memory before and after.
template <class Struct, class Run>
const char* record(const Struct& given, Run run_call) {
  std::FILE* const file = record_file();
  if (file == nullptr) return run_call();
  Call call(given);
  std::vector<int32_t> index;
  std::vector<Buffer> buffers = buffers_of(call, index);
  for (Buffer& b : buffers) b.before = contents(b);
  const char* const error = run_call();
  const auto put = [file](const void* from, size_t bytes) {
    if (std::fwrite(from, 1, bytes, file) != bytes)
      throw std::runtime_error("QUANTKIT_EMU_RECORD: cannot write");
  };
  put(&call.kind, sizeof(Kind));
  parts_of(call, put);
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

}  // namespace recorded
}  // namespace quantkit
