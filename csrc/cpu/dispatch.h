// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "../kernels.h"

namespace quantkit {

// The table in use: the best this machine runs, or the one that QUANTKIT_ISA names. Throws
// std::runtime_error where the machine or the build lacks that one.
const KernelTable& kernels();

// The CUDA kernels as the emulator runs them, where they are the instruction set in use; else nullptr.
const LaunchTable* emulated_launches();

// The name of what is in use.
std::string isa();

// Those built in that this machine runs, worst first.
std::vector<std::string> available_isas();

// For tests: switches every later call. Throws std::runtime_error as kernels() does.
void set_isa(const std::string& name);

}  // namespace quantkit
