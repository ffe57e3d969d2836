// The CPU side of accumulate.h: matrices of `rows` x `width`.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace reprise::kernels::cpu {

struct Matrix {
  void* at;
  DType dtype;
  std::int64_t row_stride;  // elements
};

void accumulate(const Matrix& into, const Matrix& x, std::int64_t rows, std::int64_t width);
void cast(const Matrix& x, const Matrix& y, std::int64_t rows, std::int64_t width);
void add(const Matrix& x, const Matrix& r, const Matrix& y, std::int64_t rows, std::int64_t width);

}  // namespace reprise::kernels::cpu
