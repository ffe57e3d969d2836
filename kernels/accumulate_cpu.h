// The CPU side of accumulate.h.
#pragma once

#include "kernels/matrix.h"

namespace reprise::kernels::cpu {

void accumulate(const Matrix& into, const Matrix& x, MatrixSize size);
void cast(const Matrix& x, const Matrix& y, MatrixSize size);
void add(const Matrix& x, const Matrix& r, const Matrix& y, MatrixSize size);

}  // namespace reprise::kernels::cpu
