// How sums over the rows of a matrix are cut on a CUDA device.
#pragma once

#include <cstdint>

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

inline constexpr std::int64_t kSumRows = 512;  // of a chunk

// At least one, so that nothing has sums too. A grid has fewer than 2^16 in this direction.
constexpr std::int64_t column_sum_chunks(std::int64_t rows) {
  return rows <= kSumRows ? 1 : (rows + kSumRows - 1) / kSumRows;
}
// f32 elements of workspace.
constexpr std::int64_t column_sum_elements(const MatrixSize& size) {
  const std::int64_t chunks = column_sum_chunks(size.rows);
  return chunks == 1 ? 0 : chunks * size.width;
}

}  // namespace reprise::kernels
