// What matmul.cc calls after the checks.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "kernels/matmul_tile.h"

namespace reprise::kernels::cpu {

// How a product is cut into tasks, by its sizes alone.
struct MatmulCut {
  std::int64_t rows, columns, depth;  // of one task; depth: of one product within it
  bool pack;                          // copy the task's part of B to contiguous rows first
};
MatmulCut matmul_cut(const TileShape& product);

// Bytes of workspace for `threads` threads.
std::int64_t matmul_workspace_bytes(const TileShape& product, int threads);

// `workspace` is aligned to 64 bytes. All sizes at least 1.
void matmul(const TileShape& product, const void* a, const void* b, void* c, const void* bias,
            void* workspace, int threads);

void column_sums(DType dtype, const void* x, std::int64_t rows, std::int64_t columns,
                 std::int64_t row_stride, DType sums_dtype, void* sums, bool accumulate);

}  // namespace reprise::kernels::cpu
