// Whether sizes fit each other.
#pragma once

#include "values.h"

namespace quantkit {

bool fits(const TensorInfo& p, const TensorInfo& x);
bool fit_each_other(const TensorInfo& a, const TensorInfo& b);

}  // namespace quantkit
