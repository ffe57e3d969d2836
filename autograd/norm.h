// rms_norm and layer_norm on Variables. Formulas, shapes, dtypes and roundings: kernels/norm.h.
//
//   Variable y = rms_norm(x, weight, 1e-6);
//   auto [y, sum] = rms_norm_residual(x, residual, weight, 1e-6);  // sum = x + residual
//
// Saved for backward: x (or the sum) and one or two floats a row; not y, which is computed again.
#pragma once

#include "autograd/variable.h"

namespace reprise {

struct Normed {
  Variable y, sum;
};

// x [.., C], weight [C].
Variable rms_norm(Variable x, Variable weight, double epsilon);
Normed rms_norm_residual(Variable x, Variable residual, Variable weight, double epsilon);

// `bias` [C] may be absent.
Variable layer_norm(Variable x, Variable weight, Variable bias, double epsilon);
Normed layer_norm_residual(Variable x, Variable residual, Variable weight, Variable bias,
                           double epsilon);

}  // namespace reprise
