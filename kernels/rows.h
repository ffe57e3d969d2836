// Some rows of a matrix, chosen by number: read, added to, replaced.
//
// Rows are the leading dimensions of x taken together: x is [.., C], with N rows. m counts the
// chosen rows.
//   take_rows   y[m] = x[rows[m]]
//   add_rows    out = x, but out[rows[m]] = x[rows[m]] + y[m]
//   put_rows    out = x, but out[rows[m]] = y[m]
// and the gradients that are not one of these themselves:
//   take_rows_gradient   dx[rows[m]] = dy[m], 0 elsewhere
//   put_rows_gradient    dx = dout, but 0 at rows
//
// Shapes    x, out and their gradients [.., C]; rows [M]; y and dy [M, C]. Any may be empty.
// Types     rows i64; the others f32 or bf16, one for all but gradients that are written, which may
//           be either. Sums are in f32, rounded once.
// Layout    rows contiguous; the others rows of unit stride.
// Aliasing  out may be x, dx may be dout: then only the chosen rows are touched. Otherwise outputs
//           overlap nothing.
// `accumulate` adds to what is there; the gradient at the other rows, 0, leaves them as they were.
// Each row is chosen at most once, so that nothing depends on an order.
// Errors    a row number outside of [0, N), by position; a row chosen twice, by number and both
//           positions; other dtypes, shapes, devices or strides. Numbers are real on meta, and are
//           checked there too. On a cuda device they are not: see expect_distinct_rows. There the
//           kernels pass over rows that are not there, which they read as zeros, and of a row that
//           is chosen twice either may be the one.
// Workspace of put_rows_gradient, where it accumulates: 4 bytes for each of the N rows.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/tensor.h"

namespace reprise::kernels {

void take_rows(const Tensor& x, const Tensor& rows, const Tensor& y, bool accumulate = false);
void add_rows(const Tensor& x, const Tensor& rows, const Tensor& y, const Tensor& out);
void put_rows(const Tensor& x, const Tensor& rows, const Tensor& y, const Tensor& out);

void take_rows_gradient(const Tensor& rows, const Tensor& dy, const Tensor& dx,
                        bool accumulate = false);
void put_rows_gradient(const Tensor& rows, const Tensor& dout, const Tensor& dx,
                       bool accumulate = false);

// The checks of `rows` for a matrix of `count` rows on `device`. A cuda device checks the numbers
// itself, and the Error comes where the host waits for it (core/device_faults.h): once for an op,
// not at every kernel.
void expect_distinct_rows(std::string_view operation, const Tensor& rows, std::int64_t count,
                          Device device);

}  // namespace reprise::kernels
