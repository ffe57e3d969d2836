// Rows divided by their length, on Variables. Formulas: kernels/l2_normalize.h.
#pragma once

#include "autograd/variable.h"

namespace reprise {

// x [.., C] -> x / sqrt(sum(x^2)) of each row, without an epsilon. Saves y and one float a row.
Variable l2_normalize(Variable x);

}  // namespace reprise
