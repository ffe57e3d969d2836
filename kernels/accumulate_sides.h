// The sides of accumulate.h.
#pragma once

#include "kernels/matrix_sides.h"

namespace reprise::kernels::cpu {

void accumulate(const Matrix& into, const Matrix& x, MatrixSize size);
void cast(const Matrix& x, const Matrix& y, MatrixSize size);
void add(const Matrix& x, const Matrix& r, const Matrix& y, MatrixSize size);

}  // namespace reprise::kernels::cpu

// In order of the stream; f32 and bf16 only.
namespace reprise::kernels::cuda {

void cast(const Matrix& x, const Matrix& y, MatrixSize size, void* stream);
// Also y = y + r.
void add(const Matrix& x, const Matrix& r, const Matrix& y, MatrixSize size, void* stream);

}  // namespace reprise::kernels::cuda
