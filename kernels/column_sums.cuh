// Sums over the rows of a matrix. Rows are cut into chunks (column_sum_chunks), a block adds a
// strip of columns of one chunk, and the chunks' sums are added in order: which sums with which
// depends on the sizes alone.
#pragma once

#include "kernels/column_sums.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {

// Threads of a block: runs of 8 columns side by side, groups of rows.
inline constexpr int kSumRuns = 8, kSumGroups = 32;

template <class F>
__global__ void __launch_bounds__(kSumRuns* kSumGroups)
    column_sums_kernel(F f, MatrixSize size, Matrix to, bool accumulate) {
  __shared__ float of_group[kSumGroups][kSumRuns * kRun];
  const std::int64_t column =
      (static_cast<std::int64_t>(blockIdx.x) * kSumRuns + threadIdx.x) * kRun;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t end = first + kSumRows < size.rows ? first + kSumRows : size.rows;
  const std::int64_t left = size.width - column;
  const int count = left < kRun ? static_cast<int>(left) : kRun;
  Run total = {};
  if (left > 0) {
#pragma unroll 4
    for (std::int64_t row = first + threadIdx.y; row < end; row += kSumGroups) {
      const Run run = f(row, column, count);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        total.at[i] += run.at[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    of_group[threadIdx.y][threadIdx.x * kRun + i] = total.at[i];
  }
  __syncthreads();
  const int at = static_cast<int>(threadIdx.y) * kSumRuns + static_cast<int>(threadIdx.x);
  const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * kSumRuns * kRun + at;
  if (at < kSumRuns * kRun && own < size.width) {
    float sum = 0.0f;
    for (int group = 0; group < kSumGroups; ++group) {
      sum += of_group[group][at];
    }
    store_one(to, blockIdx.y, own, sum, accumulate);
  }
}

struct AddChunks {
  Matrix partial, sums;
  std::int64_t chunks;
  bool accumulate;
  __device__ void operator()(std::int64_t, std::int64_t column, int count) const {
    Run total = {};
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Run run = load_run(partial, chunk, column, count);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        total.at[i] += run.at[i];
      }
    }
    store_run(sums, 0, column, count, total, accumulate);
  }
};

// sums [width] (+)= the sums over the rows of f(row, column, count), a Run. `partial` is workspace
// of column_sum_elements(size), null where that is 0.
template <class F>
void launch_column_sums(const char* name, F f, MatrixSize size, const Matrix& sums, bool accumulate,
                        float* partial, void* stream) {
  constexpr int kStrip = kSumRuns * kRun;
  const std::int64_t chunks = column_sum_chunks(size.rows);
  const std::int64_t strips = (size.width + kStrip - 1) / kStrip;
  if (strips == 0) {
    return;
  }
  const bool whole = chunks == 1;
  const Matrix to = whole ? sums : Matrix{partial, DType::f32, size.width};
  launch(name, column_sums_kernel<F>,
         {dim3(static_cast<unsigned>(strips), static_cast<unsigned>(chunks)),
          dim3(kSumRuns, kSumGroups)},
         static_cast<cudaStream_t>(stream), f, size, to, whole && accumulate);
  if (!whole) {
    launch_runs("column_sums_of_chunks", AddChunks{to, sums, chunks, accumulate}, {1, size.width},
                stream);
  }
}

}  // namespace reprise::kernels::cuda
