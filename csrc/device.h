// Where an operation runs: the CPU's kernels, or the GPU's on torch's current stream of the tensor's device.
// The one place that knows of devices.
#pragma once

#include "kernels.h"
#include "tensor.h"

namespace quantkit {

void run(Operation operation, const Elementwise& elements, const View& on);
void run(const Conversion& conversion, const View& on);

// Chooses parameters; then runs `fused`, unless it is none, on the elements with them.
void run(const Dynamic& dynamic, Operation fused, const View& on);

}  // namespace quantkit
