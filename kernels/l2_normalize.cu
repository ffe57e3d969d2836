#include "kernels/l2_normalize_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Calls f(first column, number of elements) for the runs of this lane. What a lane writes in a
// later pass over the row it alone has read in an earlier one: outputs may be inputs.
template <class F>
__device__ __forceinline__ void for_lane(std::int64_t width, F f) {
  for (std::int64_t column = threadIdx.x % 32 * kRun; column < width; column += 32 * kRun) {
    f(column, width - column < kRun ? static_cast<int>(width - column) : kRun);
  }
}

__device__ __forceinline__ std::int64_t row_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
}

__device__ __forceinline__ float row_dot(const Matrix& a, const Matrix& b, std::int64_t row,
                                         std::int64_t width) {
  float total = 0.0f;
  for_lane(width, [&](std::int64_t column, int count) {
    const Run x = load_run(a, row, column, count), y = load_run(b, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      total += x.at[i] * y.at[i];
    }
  });
  return warp_sum(total);
}

__global__ void __launch_bounds__(kThreads)
    forward_kernel(Matrix x, Matrix y, float* scales, MatrixSize size) {
  const std::int64_t row = row_of_warp();
  if (row >= size.rows) {
    return;  // a warp as a whole; there is no barrier of the block
  }
  const float scale = 1.0f / sqrtf(row_dot(x, x, row, size.width));
  if (threadIdx.x % 32 == 0) {
    scales[row] = scale;
  }
  for_lane(size.width, [&](std::int64_t column, int count) {
    Run run = load_run(x, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= scale;
    }
    store_run(y, row, column, count, run);
  });
}

__global__ void __launch_bounds__(kThreads)
    backward_kernel(Matrix dy, Matrix y, const float* scales, Matrix dx, bool accumulate,
                    MatrixSize size) {
  const std::int64_t row = row_of_warp();
  if (row >= size.rows) {
    return;
  }
  const float dot = row_dot(dy, y, row, size.width), scale = scales[row];
  for_lane(size.width, [&](std::int64_t column, int count) {
    Run run = load_run(dy, row, column, count);
    const Run unit = load_run(y, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] = (run.at[i] - unit.at[i] * dot) * scale;
    }
    store_run(dx, row, column, count, run, accumulate);
  });
}

LaunchShape shape_of(MatrixSize size) {
  return {dim3(static_cast<unsigned>((size.rows + kWarps - 1) / kWarps)), dim3(kThreads)};
}

}  // namespace

void l2_normalize(const Matrix& x, const Matrix& y, float* scale, MatrixSize size, void* stream) {
  launch("l2_normalize", forward_kernel, shape_of(size), static_cast<cudaStream_t>(stream), x, y,
         scale, size);
}

void l2_normalize_backward(const Matrix& dy, const Matrix& y, const float* scale, const Matrix& dx,
                           bool accumulate, MatrixSize size, void* stream) {
  launch("l2_normalize_backward", backward_kernel, shape_of(size),
         static_cast<cudaStream_t>(stream), dy, y, scale, dx, accumulate, size);
}

}  // namespace reprise::kernels::cuda
