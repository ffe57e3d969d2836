// Sums of two tensors and conversions between dtypes: what the tape adds gradients with.
//
// Shapes: all arguments have the same one. Each is contiguous or rows of unit stride (a slice of a
// wider matrix). Dtypes: f32, bf16, f64. Arithmetic in f32, in f64 when one of the dtypes is f64;
// one rounding to the dtype of the result, to nearest even. On a cuda device f32 and bf16 only.
// Errors: dtypes that are not floating, other shapes, devices or strides.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

// into += x, any two of the dtypes. x may be `into` itself, but not overlap it otherwise.
void accumulate(const Tensor& into, const Tensor& x);

// y = x, any two of the dtypes. y must not overlap x unless it is x.
void cast(const Tensor& x, const Tensor& y);

// y = x + r, all of one dtype. y may be x or r.
void add(const Tensor& x, const Tensor& r, const Tensor& y);

}  // namespace reprise::kernels
