// Where an operation runs: the CPU's kernels, or the GPU's on torch's current stream of the
// tensor's device. The one place that knows of devices.
#pragma once

#include "tensor.h"

namespace quantkit {

void run(const Elementwise& elements, const TensorInfo& on);
void run(const Dynamic& dynamic, const TensorInfo& on);
void run(const Measure& m, const TensorInfo& on);
// Rounds what was measured of `count` blocks, or gives its digits.
void finish(const Measured* measured, int64_t count, const MeasuredOut& out, const TensorInfo& on);
void run(const Linear& linear, const TensorInfo& on);

// Whether its kernels take codes of which several share a byte, when they lie side by side.
bool packs_codes(const TensorInfo& on);
// Whether torch adds the products of codes there, before a linear layer runs.
bool sums_by_torch(const TensorInfo& on);

}  // namespace quantkit
