// A low-rank adapter's products on Variables. Formulas, types, roundings: kernels/low_rank.h.
//
//   Variable y = linear(x, weight, bias);
//   Variable u = low_rank(std::move(x), a, {.scale = alpha / rank, .dropout = 0.1}, &generator);
//   y = add_low_rank(std::move(y), std::move(u), b);        // in y's buffer
#pragma once

#include "autograd/variable.h"
#include "core/philox.h"

namespace reprise {

struct LowRank {
  double scale = 1;
  double dropout = 0;
};

// s drop(x) A^T: x [.., I], A [R, I] -> [.., R] of A's dtype. Saves x where A needs a gradient (not
// a dropped or widened copy), A where x does. The random numbers are taken from the generator here,
// once; it may be null when dropout is 0.
Variable low_rank(Variable x, Variable a, const LowRank& options, Generator* generator = nullptr);

// y + u B^T: y [.., O], u [.., R], B [O, R]; of y's dtype. Saves u and B, not y.
Variable add_low_rank(Variable y, Variable u, Variable b);

// 1 / |W + scale B A| for each row, f32 [O]. No gradient flows through it, and nothing is saved.
Variable merged_norms(Variable w, bool in_out, Variable a, Variable b, double scale);

}  // namespace reprise
