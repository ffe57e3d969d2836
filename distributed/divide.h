// What the reducer and sharding have in common.
#pragma once

#include "core/tensor.h"
#include "distributed/reducer.h"

namespace reprise::distributed {

// data /= divisor, element by element; nothing on meta.
void divide(const Tensor& data, double divisor);

// What a sum over ranks is divided by: `tokens` are those trained on all of them in the step,
// `live` the ranks that had data.
double divisor_of(const ReducerOptions& options, std::int64_t tokens, int live, int ranks);

// Throws Error for options that do not fit together, or not so many ranks.
void expect_compatible(const ReducerOptions& options, int ranks);

}  // namespace reprise::distributed
