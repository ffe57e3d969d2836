// Rows divided by their length.
//
// Rows are the leading dimensions of x taken together: x is [.., C].
//   scale = 1 / sqrt(sum(x^2)),  y = x * scale;  a row of zeros becomes NaN: there is no epsilon
//   dx    = scale * (dy - y * sum(dy * y))
//
// Shapes    x, y, dy and dx [.., C]; scale the leading dimensions of x. Any of them may be empty.
// Types     x, y and dy f32 or bf16, the same; dx either; scale f32. Arithmetic is in f32, one
//           rounding.
// Layout    x, y, dy and dx: rows of unit stride; scale contiguous.
// Aliasing  y may be x; dx may be dy. With `accumulate` dx is added to what is there.
// Errors    other dtypes, shapes, devices or strides.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

void l2_normalize(const Tensor& x, const Tensor& y, const Tensor& scale);
void l2_normalize_backward(const Tensor& dy, const Tensor& y, const Tensor& scale, const Tensor& dx,
                           bool accumulate = false);

}  // namespace reprise::kernels
