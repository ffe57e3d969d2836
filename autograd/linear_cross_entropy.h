// The loss head on Variables: kernels/linear_cross_entropy.h has the formula, shapes and errors.
#pragma once

#include "autograd/variable.h"
#include "kernels/cross_entropy.h"

namespace reprise {

// cross_entropy(x W^T, labels) for x [N, C], weight [V, C], labels [N], without the logits as a
// whole. `items` as in cross_entropy.
//
// What needs a gradient gets it formed in the forward, for an upstream gradient of 1: both are
// outputs of the record, saved, dropped and replayed as any other. The sweep hands them over
// without a copy when the upstream gradient is 1, else multiplied by it. So an average over
// micro-batches is better taken with `items` than by scaling the loss. The gradient of a parameter
// has its grad_dtype, any other weight's its own dtype.
Variable linear_cross_entropy(Variable x, Variable weight, const Tensor& labels, double items = 0);
Variable linear_cross_entropy(Variable x, Variable weight, const Tensor& labels,
                              const kernels::CrossEntropyOptions& options);

}  // namespace reprise
