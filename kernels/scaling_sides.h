// The sides of scaling.h.
#pragma once

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

// What element (row, column) is multiplied by: element row * row_step + column * column_step of v.
struct FactorSteps {
  std::int64_t row, column;
};

// Rows are multiplied and summed in pieces of this many elements first.
inline constexpr std::int64_t kDotElements = 1024;
inline std::int64_t dot_pieces(std::int64_t width) {
  return (width + kDotElements - 1) / kDotElements;
}

struct DotCall {
  Matrix x, dy, dv;
  MatrixSize size;
  bool accumulate;
  float* partial;  // workspace [rows, dot_pieces(width)]; of column_dots on CUDA: column_sums.h
};

namespace cpu {
void scale_by(const Matrix& x, const Matrix& v, FactorSteps steps, const Matrix& y, bool accumulate,
              MatrixSize size);
void column_dots(const DotCall& call);
void row_dots(const DotCall& call);
void dot(const DotCall& call);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void scale_by(const Matrix& x, const Matrix& v, FactorSteps steps, const Matrix& y, bool accumulate,
              MatrixSize size, void* stream);
void column_dots(const DotCall& call, void* stream);
void row_dots(const DotCall& call, void* stream);
void dot(const DotCall& call, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
