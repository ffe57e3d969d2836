// What the reducer and sharding have in common.
#pragma once

#include "core/tensor.h"
#include "distributed/reducer.h"

namespace reprise::distributed {

// data /= divisor, element by element; nothing on meta.
void divide(const Tensor& data, double divisor);

// Throws Error for options that do not fit together, or not so many ranks.
void expect_compatible(const ReducerOptions& options, int ranks);

}  // namespace reprise::distributed
