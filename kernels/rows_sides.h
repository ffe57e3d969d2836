// The sides of rows.h.
#pragma once

#include "core/device_faults.h"
#include "kernels/matrix_sides.h"

namespace reprise::kernels {

// Row `from` of a matrix goes to row `to` of another: chosen by number, or one after the other.
struct RowCopy {
  Matrix from, to;
  const std::int64_t* from_rows = nullptr;  // null: m itself
  const std::int64_t* to_rows = nullptr;
  std::int64_t count = 0, width = 0;
  std::int64_t rows = 0;  // of the matrix that is chosen from
  bool accumulate = false;
};

// What a check of row numbers says of one that is not there, and of one that is chosen twice
// (`other` is the second position).
struct RowSites {
  std::int64_t range, twice;
};

namespace cpu {
void copy_rows(const RowCopy& call);
// `at` [count] of `to` become 0.
void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size);
// to += from for the rows of `size` that are not among `rows`; `chosen` is workspace [size.rows].
void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size);
}  // namespace cpu

// In order of the stream. Numbers outside of [0, rows) are passed over, and read as zeros.
namespace cuda {
void check_rows(const std::int64_t* numbers, std::int64_t count, std::int64_t rows, RowSites sites,
                DeviceFault* word, void* stream);
void copy_rows(const RowCopy& call, void* stream);
// `rows` of `to`.
void zero_rows(const Matrix& to, const std::int64_t* at, MatrixSize size, std::int64_t rows,
               void* stream);
void add_other_rows(const Matrix& from, const Matrix& to, const std::int64_t* rows,
                    std::int64_t count, std::int32_t* chosen, MatrixSize size, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
