// Whether tensors share memory, to the byte, whatever their strides.
#pragma once

#include "tensor.h"

namespace quantkit {

// Two elements of t at one address.
bool overlaps_itself(const TensorInfo& t);

// A byte that belongs to elements of both.
bool overlap(const TensorInfo& a, const TensorInfo& b);

}  // namespace quantkit
