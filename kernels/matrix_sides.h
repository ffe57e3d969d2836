// A tensor as the sides of the elementwise families see it: rows of unit stride. Free of Tensor, so
// that a .cu sees no more than it needs.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace reprise::kernels {

struct Matrix {
  void* at = nullptr;  // null: absent, or on meta
  DType dtype = DType::f32;
  std::int64_t row_stride = 0;  // elements

  void* element(std::int64_t row, std::int64_t column) const {
    return static_cast<char*>(at) +
           (row * row_stride + column) * static_cast<std::int64_t>(size_bytes(dtype));
  }
  // The part of a row that starts there; absent stays absent.
  Matrix run(std::int64_t row, std::int64_t column) const {
    return {at == nullptr ? nullptr : element(row, column), dtype, row_stride};
  }
};

struct MatrixSize {
  std::int64_t rows, width;
};

}  // namespace reprise::kernels
