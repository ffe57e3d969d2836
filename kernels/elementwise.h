// Products with a tensor or a number, and a bias over rows. (Sums are in kernels/accumulate.h.)
//
// x and y have one shape; each is contiguous or rows of unit stride. Dtypes f32 or bf16, the same
// for all but gradients that are written, which may be either; arithmetic in f32, one rounding.
// y may be x or r exactly. With `accumulate` the result is added to what is there.
// Errors: other dtypes, shapes, devices or strides.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

// y = x * r. In backward the product of dy and the other factor.
void mul(const Tensor& x, const Tensor& r, const Tensor& y, bool accumulate = false);

// y = factor * x; the factor is rounded to f32.
void scale(const Tensor& x, double factor, const Tensor& y, bool accumulate = false);

// y = x + bias on every row: x [.., C], bias [C].
void add_bias(const Tensor& x, const Tensor& bias, const Tensor& y);
// dbias [C] = sum of the rows of dy [.., C], in f32, in an order that depends on the shape only.
void bias_gradient(const Tensor& dy, const Tensor& dbias, bool accumulate);

}  // namespace reprise::kernels
