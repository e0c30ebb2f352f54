// From sizes, strides and the shapes of parameters to the levels that kernels walk. No torch.
#pragma once

#include <vector>

#include "kernels.h"

namespace quantkit {

// One dimension: its size, the strides of x, q and y in elements, and how each parameter changes
// along it: element i uses index i / block, `step` elements apart (0: one for the whole dimension).
struct Dimension {
  struct Along {
    int64_t block, step;
  };
  int64_t size;
  int64_t strides[3];
  Along scale, zero_point;
};

// Levels in the order of memory, `first` deciding before `second`, with neighbours merged.
std::vector<Level> levels_of(const std::vector<Dimension>& dimensions, Operand first, Operand second);

// Those that step from parameter to parameter.
std::vector<Level> parameter_levels(const std::vector<Level>& levels);

Shape shape_of(const std::vector<Level>& levels);

}  // namespace quantkit
