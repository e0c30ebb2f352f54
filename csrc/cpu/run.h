// Splits an operation over threads and runs it. No torch: the caller lends its thread pool.
#pragma once

#include "dispatch.h"

namespace quantkit {

struct Pool {
  int64_t threads;
  // Calls task(i, context) for every i below tasks, in any order on any thread, and waits.
  void (*run)(int64_t tasks, void (*task)(int64_t i, void* context), void* context);
};

using Range = void (*)(const Elementwise&, int64_t begin, int64_t end);

// The kernel of the instruction set in use; none: null.
Range range_of(Operation operation);

void run(Range function, const Elementwise& elements, const Pool& pool);
void run(const Conversion& conversion, const Pool& pool);

// Chooses parameters; then, where fused is not null, calls it on the elements with them.
void run(const Dynamic& dynamic, Range fused, const Pool& pool);

}  // namespace quantkit
