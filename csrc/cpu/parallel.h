// Splits an operation over threads and runs it. No torch: the caller brings its thread pool.
#pragma once

#include "dispatch.h"

namespace quantkit {

struct Pool {
  int64_t threads;
  // Calls task(i, context) for every i below tasks, in any order on any thread, and waits.
  void (*run)(int64_t tasks, void (*task)(int64_t i, void* context), void* context);
};

void run_on_cpu(const Elementwise& elements, const Pool& pool);
void run_on_cpu(const Dynamic& dynamic, const Pool& pool);
void run_on_cpu(const Measure& measure, const Pool& pool);
void run_on_cpu(const Linear& linear, const Pool& pool);
void finish_on_cpu(const Measured* measured, int64_t count, const MeasuredOut& out);

}  // namespace quantkit
