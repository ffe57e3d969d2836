// The sides of rows.h.
#pragma once

#include "kernels/matrix_sides.h"

namespace reprise::kernels {

// Row `from` of a matrix goes to row `to` of another: chosen by number, or one after the other.
struct RowCopy {
  Matrix from, to;
  const std::int64_t* from_rows = nullptr;  // null: m itself
  const std::int64_t* to_rows = nullptr;
  std::int64_t count = 0, width = 0;
  bool accumulate = false;
};

namespace cpu {
void copy_rows(const RowCopy& call);
// `at` [count] of `to` become 0.
void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size);
// to += from for the rows of `size` that are not among `rows`; `chosen` is workspace [size.rows].
void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size);
}  // namespace cpu

// In order of the stream.
namespace cuda {
void copy_rows(const RowCopy& call, void* stream);
void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size, void* stream);
void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
