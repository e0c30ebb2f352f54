// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "../calls.h"

// What the Python module calls in the library.
#define QK_EXPORT __attribute__((visibility("default")))

namespace quantkit {

// The table in use: the best this machine runs, or the one that QUANTKIT_ISA names. Throws
// std::runtime_error where the machine or the build lacks that one.
const KernelTable& kernels();

// Its linear layers, or better ones of the same instruction set.
const LinearTable& linear_kernels();

// The CUDA kernels as the emulator runs them, where they are the instruction set in use; else
// nullptr.
const LaunchTable* emulated_launches();

// The name of what is in use.
QK_EXPORT std::string isa();

// Those built in that this machine runs, worst first.
QK_EXPORT std::vector<std::string> available_isas();

// For tests: switches every later call. Throws std::runtime_error as kernels() does.
QK_EXPORT void set_isa(const std::string& name);

// Whether this process was forked from one whose threads OpenMP may own. They do not survive that:
// a child that asks for some waits for ever (torch's own operators do), so its kernels run on one.
QK_EXPORT bool forked_from_threads();
// Says that some are used from here on.
void use_threads();

}  // namespace quantkit
