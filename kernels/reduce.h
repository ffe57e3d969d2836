// Sums over all elements of a tensor, and over many tensors.
//
//   sum           out = factor * sum_i x_i              d x_i += factor * g
//   sum_squares   out = factor * sum_i x_i^2            d x_i += 2 * factor * g * x_i
//   squared_norms out_j = sum_i x_ji^2 for tensor j of a list
//   scale_all     x_ji *= factor for every tensor j of a list
//
// A mean is a sum with factor = 1 / numel (an empty tensor: infinity, so that the mean is NaN).
// Shapes: x any; out and g scalars []; out of squared_norms [tensors].
// Dtypes: x f32 or bf16; out f32 or f64; g f32; the gradient of x has x's dtype. Blocks of
// elements are added in f32, the blocks in f64.
// Strides: x is contiguous or rows of unit stride; gradients and the tensors of a list are
// contiguous.
// Order: blocks and chunks are cut by the number of elements alone, so a sum depends neither on the
// number of threads nor on strides or addresses.
// Errors: dtypes, shapes, devices or strides other than these.
#pragma once

#include <span>

#include "core/tensor.h"
#include "kernels/reduce_blocks.h"

namespace reprise::kernels {

void sum(const Tensor& x, double factor, const Tensor& out);
// Workspace: none.
void sum_backward(const Tensor& g, double factor, const Tensor& dx, bool accumulate = false);

void sum_squares(const Tensor& x, double factor, const Tensor& out);
// dx may be x when it does not accumulate.
void sum_squares_backward(const Tensor& g, const Tensor& x, double factor, const Tensor& dx,
                          bool accumulate = false);

void squared_norms(std::span<const Tensor> tensors, const Tensor& out);
void scale_all(std::span<const Tensor> tensors, double factor);

}  // namespace reprise::kernels
