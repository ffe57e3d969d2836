// Resizing of an image, or of a table of positions, by cubic convolution.
//
// Position i of an axis of n elements lies at s = (i + 1/2) N / n - 1/2 of an axis of N; with
// k = floor(s) and t = s - k, element i is the sum of the elements k - 1, k, k + 1, k + 2, those
// beyond an edge being the one at the edge, with the weights f(t + 1), f(t), f(1 - t), f(2 - t):
//   f(u) = (A + 2) u^3 - (A + 3) u^2 + 1           u <= 1
//   f(u) = A u^3 - 5 A u^2 + 8 A u - 4 A           u > 1         A = -0.75
// y is x resized along both axes. There is no widening of f where it shrinks (no antialiasing).
// The gradient of x is the transpose of that map.
//
// Shapes    x and dx [H, W, C]; y and dy [height, width, C]. C may be 0, the others not.
// Types     f32 or bf16: x and y the same, dy and dx any. Arithmetic is in f32, weights are
// computed
//           in f64; one rounding.
// Layout    rows of unit stride. With `accumulate` the gradient is added to what is there.
// Errors    other dtypes, shapes, devices or strides.
// Source    Keys, "Cubic convolution interpolation for digital image processing", 1981; A, edges
// and
//           positions as PyTorch's bicubic with align_corners = False.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

void resize_bicubic(const Tensor& x, const Tensor& y);
void resize_bicubic_gradient(const Tensor& dy, const Tensor& dx, bool accumulate = false);

}  // namespace reprise::kernels
