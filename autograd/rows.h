// Some rows of a matrix on Variables, chosen by number. Formulas, shapes, dtypes: kernels/rows.h.
//
//   Variable images = take_rows(x, rows);                                 // [M, C]
//   y = add_rows(std::move(y), rows, linear(images, ...));                // in y's buffer
//   x = put_rows(std::move(x), rows, features);
//
// x [.., C]; rows i64 [M], each number in range and at most once: else an Error names position or
// row. M may be 0: gradients are then zeros, not absent. On a cuda device the check waits for a
// copy of the numbers to the host, once a call (not in a replay or in backward). None saves more
// than `rows`.
#pragma once

#include "autograd/variable.h"

namespace reprise {

// The chosen rows.
Variable take_rows(Variable x, Variable rows);
// x with y [M, C] added at the chosen rows.
Variable add_rows(Variable x, Variable rows, Variable y);
// x with the chosen rows replaced by y [M, C]; the gradient of x is zero there.
Variable put_rows(Variable x, Variable rows, Variable y);

}  // namespace reprise
