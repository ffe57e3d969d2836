// Matrix products on Variables. Formulas, dtypes and the order of sums: kernels/matmul.h.
//
//   Variable y = linear(x, weight, bias);                       // [B, T, C] -> [B, T, F]
//   Variable scores = matmul(a, b, {.transpose_b = true});
#pragma once

#include "autograd/variable.h"

namespace reprise {

// y = x W^T + b. x [.., I], W [O, I], or [I, O] when in_out (as GPT-2's files have it); b [O] may
// be absent. y [.., O] of x's dtype, which must be W's. Gradients: dx = dy W, dW = dy^T x, db = sum
// of dy over rows. Held for backward: x only where W needs a gradient, W only where x does.
Variable linear(Variable x, Variable weight, Variable bias = {}, bool in_out = false);

struct ProductOptions {
  bool transpose_a = false, transpose_b = false;
};

// C [.., N] = op(A) op(B). A [.., K], leading dimensions taken together as rows, or A [K, M] when
// transpose_a; B [K, N], or [N, K] when transpose_b. C [.., N], or [M, N].
Variable matmul(Variable a, Variable b, ProductOptions options = {});

}  // namespace reprise
