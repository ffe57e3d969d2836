// Products with factors that have a gradient. Formulas, shapes, dtypes: kernels/scaling.h.
//
//   Variable y = scale_columns(std::move(x), magnitude);      // x [.., C], magnitude [C]
//   Variable logits = scale(std::move(products), exp(temperature));
//
// Each saves x where the factors need a gradient, and the factors where x does.
#pragma once

#include "autograd/variable.h"

namespace reprise {

// x [.., C] v [C].
Variable scale_columns(Variable x, Variable v);
// x [.., C], a factor a row: v [rows], or of the leading dimensions of x.
Variable scale_rows(Variable x, Variable v);
// factor []. (By a number: autograd/elementwise.h.)
Variable scale(Variable x, Variable factor);

}  // namespace reprise
