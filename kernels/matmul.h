// Matrix products.
//
//   matmul:       C [M, N] = op(A) op(B) (+ bias [N]) (+ C when accumulate)
//   column_sums:  sums [N] = sum over rows of X [M, N]  (+ sums when accumulate)
//
// Shapes: every argument is a matrix once its leading dimensions are taken together: A [.., K], or
// [.., M] over K rows when transpose_a; B [K, N], or [N, K] when transpose_b; C [.., N]. Any size
// may be 0: K = 0 gives zeros (or the bias, or C as it was).
// Strides: rows of unit stride, any distance between rows; rows that are apart are copied to a
// workspace.
// Dtypes: A and B both f32 or both bf16; C f32 or bf16; bias f32 or bf16. Products accumulate in
// f32 and are rounded once: with accumulate C is read, added in f32 and rounded. Aliasing: C must
// not overlap A, B or bias. Sums: the order depends on the sizes and strides only, never on the
// number of threads: a product is cut into tasks that each run on one thread over all of K. Errors:
// shapes that do not fit, dtypes, devices or strides; bias together with accumulate.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

struct MatmulOptions {
  bool transpose_a = false, transpose_b = false;
  bool accumulate = false;
};

// `bias` may be undefined.
void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options = {},
            const Tensor& bias = {});

// X f32 or bf16, sums f32 or bf16.
void column_sums(const Tensor& x, const Tensor& sums, bool accumulate = false);

}  // namespace reprise::kernels
