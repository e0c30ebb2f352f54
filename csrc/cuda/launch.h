// The one place that launches kernels and asks the device. Work goes to a stream of the current
// device. (proof/emu/cuda_emu.cpp has the emulator's.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quantkit {
namespace {

// No kernel needs more blocks than this for each multiprocessor: threads take several items in
// turn.
constexpr int64_t kBlocksPerProcessor = 32;

int64_t multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class Args>
const char* launch(void (*kernel)(Args), int64_t blocks, int threads, void* stream,
                   const Args& args) {
  static_assert(sizeof(Args) <= 4096, "more than a kernel's arguments may be");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace quantkit
