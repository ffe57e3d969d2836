// Softmax cross-entropy on Variables: kernels/cross_entropy.h has the formula, shapes and errors.
#pragma once

#include "autograd/variable.h"
#include "kernels/cross_entropy.h"

namespace reprise {

// The sum over the valid rows of logits [.., V], divided by `items`: a scalar f32. items == 0:
// divided by the number of valid rows (the mean, NaN when there are none). Labels i64 [..]; -100 is
// ignored. Saved: the logits, the labels and log-sum-exp [..].
Variable cross_entropy(Variable logits, const Tensor& labels, double items = 0);
Variable cross_entropy(Variable logits, const Tensor& labels,
                       const kernels::CrossEntropyOptions& options);

}  // namespace reprise
