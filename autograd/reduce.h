// Sums over all elements of a Variable: kernels/reduce.h has the formulas, dtypes and errors. The
// results are scalars of f32.
#pragma once

#include "autograd/variable.h"

namespace reprise {

Variable sum(Variable x);
// NaN when x is empty.
Variable mean(Variable x);
// The mean of the squares of all elements. Saved: x.
Variable mean_square(Variable x);

}  // namespace reprise
