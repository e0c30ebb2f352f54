// What linear layers make of sums of products, which torch's own kernels have added.
#pragma once

#include "elementwise.cuh"

namespace quantkit {
namespace {

template <class Y>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const __grid_constant__ Linear l) {
  const int64_t n = l.tokens * l.outputs;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < n;
       i += gridDim.x * int64_t(kThreads)) {
    const int64_t token = i / l.outputs, output = i % l.outputs;
    float y = scaled_sum(load(l.sums + token * l.sums_stride + output), load(l.x_scale + token),
                         load(l.scale + (l.each_scale ? output : 0)));
    if (l.bias != nullptr) y = y + load(l.bias + output);
    store(static_cast<Y*>(l.y) + i, narrow<Y>(Wide<Y>(y)));
  }
}

}  // namespace
}  // namespace quantkit
