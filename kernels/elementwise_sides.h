// The sides of elementwise.h.
#pragma once

#include "kernels/matrix_sides.h"

namespace reprise::kernels::cpu {

void mul(const Matrix& x, const Matrix& r, const Matrix& y, bool accumulate, MatrixSize size);
void scale(const Matrix& x, float factor, const Matrix& y, bool accumulate, MatrixSize size);
void add_bias(const Matrix& x, const Matrix& bias, const Matrix& y, MatrixSize size);
void bias_gradient(const Matrix& dy, const Matrix& dbias, bool accumulate, MatrixSize size);

}  // namespace reprise::kernels::cpu

// In order of the stream.
namespace reprise::kernels::cuda {

void mul(const Matrix& x, const Matrix& r, const Matrix& y, bool accumulate, MatrixSize size,
         void* stream);
void scale(const Matrix& x, float factor, const Matrix& y, bool accumulate, MatrixSize size,
           void* stream);
void add_bias(const Matrix& x, const Matrix& bias, const Matrix& y, MatrixSize size, void* stream);
// `partial`: workspace of column_sum_elements(size).
void bias_gradient(const Matrix& dy, const Matrix& dbias, bool accumulate, MatrixSize size,
                   float* partial, void* stream);

}  // namespace reprise::kernels::cuda
