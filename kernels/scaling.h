// Products with factors that have a gradient themselves: one a column, one a row, or one for all.
//
// Rows are the leading dimensions of x taken together.
//   columns   y[r, c] = x[r, c] v[c]     dv[c] = sum over r of x[r, c] dy[r, c]
//   rows      y[r, c] = x[r, c] v[r]     dv[r] = sum over c
//   all       y[r, c] = x[r, c] v        dv = sum over both
// The gradient of x is the same product of dy.
//
// Shapes    x, y and dy [.., C]; v and dv [C], [rows] (or the leading dimensions of x), or [].
// Types     f32 or bf16: x and dy the same; y, v and dv any. Arithmetic is in f32, one rounding.
// Layout    x, y and dy rows of unit stride; v and dv contiguous.
// Aliasing  y may be x. With `accumulate` the result is added to what is there.
// Sums are taken in an order that depends on the shape only. Workspace of a gradient: 4 bytes for
// each 1024 elements of a row, for columns none.
// Errors    other dtypes, shapes, devices or strides. They name scale_columns, scale_rows or scale.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

enum class Factors : std::uint8_t { columns, rows, all };

void scale_by(Factors factors, const Tensor& x, const Tensor& v, const Tensor& y,
              bool accumulate = false);
void scale_by_gradient(Factors factors, const Tensor& x, const Tensor& dy, const Tensor& dv,
                       bool accumulate = false);

}  // namespace reprise::kernels
