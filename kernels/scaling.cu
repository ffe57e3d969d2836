#include "kernels/column_sums.cuh"
#include "kernels/matrix.cuh"
#include "kernels/scaling_sides.h"

namespace reprise::kernels::cuda {
namespace {

struct ScaleBy {
  Matrix x, v, y;
  FactorSteps steps;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
    if (steps.column != 0) {
      const Run factors = load_run(v, 0, column, count);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        run.at[i] *= factors.at[i];
      }
    } else {
      const float factor = load_one(v, 0, row * steps.row);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        run.at[i] *= factor;
      }
    }
    store_run(y, row, column, count, run, accumulate);
  }
};

struct Product {
  Matrix x, dy;
  __device__ Run operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
    const Run other = load_run(dy, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= other.at[i];
    }
    return run;
  }
};

constexpr int kThreads = 256;

// A warp sums a piece of a row.
__global__ void __launch_bounds__(kThreads) pieces_kernel(DotCall call, std::int64_t pieces) {
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= call.size.rows * pieces) {
    return;  // a warp as a whole; there is no barrier of the block
  }
  const std::int64_t row = index / pieces;
  const std::int64_t begin = (index - row * pieces) * kDotElements;
  const std::int64_t end =
      begin + kDotElements < call.size.width ? begin + kDotElements : call.size.width;
  float total = 0.0f;
  for (std::int64_t column = begin + threadIdx.x % 32 * kRun; column < end; column += 32 * kRun) {
    const int count = end - column < kRun ? static_cast<int>(end - column) : kRun;
    const Run x = load_run(call.x, row, column, count);
    const Run dy = load_run(call.dy, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      total += x.at[i] * dy.at[i];
    }
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) {
    call.partial[index] = total;
  }
}

__global__ void __launch_bounds__(kThreads) rows_kernel(DotCall call, std::int64_t pieces) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < call.size.rows) {
    float total = 0.0f;
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      total += call.partial[row * pieces + piece];
    }
    store_one(call.dv, 0, row, total, call.accumulate);
  }
}

// One block: each thread adds every 256th sum, then theirs are added in order.
__global__ void __launch_bounds__(kThreads) total_kernel(DotCall call, std::int64_t count) {
  __shared__ double of_thread[kThreads];
  double total = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    total += static_cast<double>(call.partial[i]);
  }
  of_thread[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0.0;
    for (int thread = 0; thread < kThreads; ++thread) {
      total += of_thread[thread];
    }
    store_one(call.dv, 0, 0, static_cast<float>(total), call.accumulate);
  }
}

void fill_partial(const DotCall& call, std::int64_t pieces, cudaStream_t stream) {
  constexpr std::int64_t kWarps = kThreads / 32;
  const std::int64_t blocks = (call.size.rows * pieces + kWarps - 1) / kWarps;
  if (blocks > 0) {
    launch("dot_pieces", pieces_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
           stream, call, pieces);
  }
}

}  // namespace

void scale_by(const Matrix& x, const Matrix& v, FactorSteps steps, const Matrix& y, bool accumulate,
              MatrixSize size, void* stream) {
  launch_runs("scale_by", ScaleBy{x, v, y, steps, accumulate}, size, stream);
}

void column_dots(const DotCall& call, void* stream) {
  launch_column_sums("column_dots", Product{call.x, call.dy}, call.size, call.dv, call.accumulate,
                     call.partial, stream);
}

void row_dots(const DotCall& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::int64_t pieces = dot_pieces(call.size.width);
  fill_partial(call, pieces, on);
  const std::int64_t blocks = (call.size.rows + kThreads - 1) / kThreads;
  launch("row_dots", rows_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, on, call,
         pieces);
}

void dot(const DotCall& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::int64_t pieces = dot_pieces(call.size.width);
  fill_partial(call, pieces, on);
  launch("dot", total_kernel, {dim3(1), dim3(kThreads)}, on, call, call.size.rows * pieces);
}

}  // namespace reprise::kernels::cuda
