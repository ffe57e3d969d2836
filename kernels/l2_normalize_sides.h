// The sides of l2_normalize.h.
#pragma once

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

namespace cpu {
void l2_normalize(const Matrix& x, const Matrix& y, float* scale, MatrixSize size);
void l2_normalize_backward(const Matrix& dy, const Matrix& y, const float* scale, const Matrix& dx,
                           bool accumulate, MatrixSize size);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void l2_normalize(const Matrix& x, const Matrix& y, float* scale, MatrixSize size, void* stream);
void l2_normalize_backward(const Matrix& dy, const Matrix& y, const float* scale, const Matrix& dx,
                           bool accumulate, MatrixSize size, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
