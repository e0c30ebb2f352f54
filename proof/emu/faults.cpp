// Kernels with a mistake each: the emulator must name it. Prints what it said, or "ok".

#include <cstdio>
#include <cstring>
#include <set>

#include "emulator.h"

using namespace quantkit;

namespace {

int data[32];
alignas(16) int out[64];

const emu::Buffers buffers = {
    {"x", reinterpret_cast<const char*>(data), reinterpret_cast<const char*>(data + 32), false},
    {"y", reinterpret_cast<const char*>(out), reinterpret_cast<const char*>(out + 64), true}};

int load(const int* p) {
  check_read(p, 4);
  return *p;
}
void store(int* p, int v) {
  check_write(p, 4);
  *p = v;
}

// The sum of all threads' numbers, as far as a block of 64 has them.
void good() {
  QK_SHARED(int, sums, 2);
  int sum = int(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  store(out + threadIdx.x, sums[0] + sums[1] + load(data));
}

std::set<unsigned> first;
void note_order() {
  static unsigned block = ~0u;
  if (blockIdx.x != block) first.insert(threadIdx.x);
  block = blockIdx.x;
}

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  int64_t blocks = 1;
  int threads = 64;
  std::function<void()> kernel;
  if (name == "good") kernel = good;
  if (name == "divergent_barrier")
    kernel = [] {
      if (threadIdx.x < 40) __syncthreads();
    };
  if (name == "two_barriers")
    kernel = [] {
      if (threadIdx.x < 32) {
        __syncthreads();
        return;
      }
      __syncthreads();
    };
  if (name == "stray_shuffle")
    kernel = [] {
      if (threadIdx.x != 5) __shfl_xor_sync(0xffffffffu, 1, 1);
    };
  if (name == "some_lanes") kernel = [] { __shfl_xor_sync(0xffffu, 1, 1); };
  if (name == "read_past_the_end")
    kernel = [] { load(data + (threadIdx.x < 33 ? threadIdx.x : 0)); };
  if (name == "write_to_an_input") kernel = [] { store(data, 1); };
  if (name == "misaligned") kernel = [] { check_read(out + 1, 16); };
  if (name == "shared_index")
    kernel = [] {
      QK_SHARED(int, few, 32);
      few[threadIdx.x < 33 ? threadIdx.x : 0] = 1;
    };
  if (name == "too_much_shared") kernel = [] { QK_SHARED(int, many, 12289); };
  if (name == "too_many_threads") kernel = good, threads = 1056;
  if (name == "no_blocks") kernel = good, blocks = 0;
  if (name == "orders") kernel = note_order, blocks = 200;

  try {
    emu::launch(blocks, threads, buffers, kernel);
  } catch (const emu::Fault& fault) {
    std::printf("%s\n", fault.what());
    return 0;
  }
  bool right = true;
  if (name == "good")
    for (const int sum : out) right &= sum == 63 * 32;
  if (name == "orders") right = first.size() > 20;
  std::printf(right ? "ok\n" : "wrong\n");
}
