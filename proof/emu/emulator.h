// Runs CUDA kernels on the CPU as a GPU would, and checks what a GPU would not tell: one coroutine
// for each thread of a block, blocks, warps and threads in random order, each warp at its own pace.
// What csrc/cuda takes from CUDA, and no more.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__ [[maybe_unused]]
#define __device__ [[maybe_unused]]
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads, ...)

#define threadIdx (::quantkit::emu::current().thread)
#define blockIdx (::quantkit::emu::current().block)
#define blockDim (::quantkit::emu::current().threads)
#define gridDim (::quantkit::emu::current().blocks)

#define __syncthreads() ::quantkit::emu::barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
  ::quantkit::emu::shuffle_xor(mask, value, distance, __FILE__, __LINE__)
#define QK_SHARED(T, name, n) ::quantkit::emu::Shared<T> name(n, __FILE__, __LINE__)

namespace quantkit {
namespace emu {

// A mistake of a kernel: ends the launch with this message.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x;
};
struct Place {
  Index thread, block, threads, blocks;
};
const Place& current();

// The memory that a launch may touch.
struct Buffer {
  const char* name;
  const char *begin, *end;
  bool writable;
};
using Buffers = std::vector<Buffer>;

void check_access(const void* p, int size, bool write);

void barrier(const char* file, int line);
uint64_t shuffle(uint64_t value, int distance, unsigned mask, const char* file, int line);

template <class T>
T shuffle_xor(unsigned mask, T value, int distance, const char* file, int line) {
  static_assert(std::is_integral<T>::value, "");
  return static_cast<T>(shuffle(static_cast<uint64_t>(value), distance, mask, file, line));
}

// Shared memory of a block: filled with garbage, every index checked.
char* shared_memory(int64_t bytes, const char* file, int line);
void check_index(int64_t i, int64_t n, const char* file, int line);

template <class T>
struct Shared {
  T* data;
  int64_t n;
  const char* file;
  int line;

  Shared(int64_t n_, const char* file_, int line_)
      : data(reinterpret_cast<T*>(shared_memory(n_ * sizeof(T), file_, line_))),
        n(n_),
        file(file_),
        line(line_) {}
  T& operator[](int64_t i) const {
    check_index(i, n, file, line);
    return data[i];
  }
};

// Runs body as every thread of every block, and throws what a thread did wrong.
void launch(int64_t blocks, int threads, const Buffers& buffers, const std::function<void()>& body);

}  // namespace emu

namespace {

inline void check_read(const void* p, int size) { emu::check_access(p, size, false); }
inline void check_write(void* p, int size) { emu::check_access(p, size, true); }

// Coroutines take turns, so an atomic needs nothing else.
template <class T>
inline void atomicMax(T* p, T v) {
  if (v > *p) *p = v;
}
template <class T>
inline void atomicAdd(T* p, T v) {
  *p += v;
}
template <class T>
inline void atomicMin(T* p, T v) {
  if (v < *p) *p = v;
}

}  // namespace
}  // namespace quantkit
