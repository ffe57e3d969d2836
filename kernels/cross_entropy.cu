#include "kernels/cross_entropy_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// e^x; 0 below 2^-100, which no sum beside a 1 can tell: no gradient is subnormal.
__device__ __forceinline__ float probability(float x) {
  return x < -69.3147181f ? 0.0f : expf(x);
}

// A NaN is passed over: the sum finds it.
__device__ __forceinline__ float block_max(float value) {
  __shared__ float of_warp[kThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lane));
  }
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float max = of_warp[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    max = fmaxf(max, of_warp[warp]);
  }
  return max;
}

// The sum of exp(x - max) of a thread's columns, and their maximum. While there is nothing but -inf
// the sum is 0.
struct Partial {
  float max, sum;
};
__device__ __forceinline__ Partial partial_of(const Matrix& x, std::int64_t row,
                                              std::int64_t width) {
  Partial part{-INFINITY, 0.0f};
  for (std::int64_t column = threadIdx.x * kRun; column < width; column += kThreads * kRun) {
    const int count = width - column < kRun ? static_cast<int>(width - column) : kRun;
    const Run run = load_run(x, row, column, count);
    float top = part.max;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      top = i < count ? fmaxf(top, run.at[i]) : top;
    }
    if (top > part.max) {
      part.sum *= part.max == -INFINITY ? 1.0f : probability(part.max - top);
      part.max = top;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) {
        const float value = run.at[i];
        part.sum += value == -INFINITY ? 0.0f : probability(value - part.max);
      }
    }
  }
  return part;
}

// A block takes a row.
__global__ void __launch_bounds__(kThreads) rows_kernel(LogitRows x, float* lses, float* losses) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t label = x.labels[row];
  const Matrix logits{x.at, x.dtype, x.row_stride};
  float lse = 0.0f, loss = 0.0f;
  if (label != x.ignore_index) {  // the same for all threads
    const Partial part = partial_of(logits, row, x.vocabulary);
    const float max = block_max(part.max);
    const float sum = block_sum<kThreads>(
        part.max == -INFINITY ? part.sum : part.sum * probability(part.max - max));
    lse = max + logf(sum);
    loss = lse - load_one(logits, row, label);
  }
  if (threadIdx.x == 0) {
    lses[row] = lse;
    losses[row] = loss;
  }
}

// One block: each thread adds every 256th loss, then their sums are added in order.
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* losses, std::int64_t count, double items, float* loss) {
  __shared__ double of_thread[kThreads];
  double total = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    total += static_cast<double>(losses[i]);
  }
  of_thread[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0.0;
    for (int thread = 0; thread < kThreads; ++thread) {
      total += of_thread[thread];
    }
    *loss = static_cast<float>(total / items);
  }
}

struct Gradient {
  LogitRows x;
  const float* lses;
  const float* g;
  double items;
  Matrix dx;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const std::int64_t label = x.labels[row];
    if (label == x.ignore_index) {
      if (!accumulate) {
        store_run(dx, row, column, count, Run{});
      }
      return;
    }
    const float lse = lses[row], factor = static_cast<float>(static_cast<double>(*g) / items);
    Run run = load_run({x.at, x.dtype, x.row_stride}, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      // Not the exponential less 1: that cancels where the label is nearly certain.
      run.at[i] =
          factor * (column + i == label ? expm1f(run.at[i] - lse) : probability(run.at[i] - lse));
      // Of an infinite lse the differences need not be NaN.
      run.at[i] += lse - lse;
    }
    store_run(dx, row, column, count, run, accumulate);
  }
};

}  // namespace

void cross_entropy(const LogitRows& x, float* lse, float* losses, float* loss, double items,
                   void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (x.rows > 0) {
    launch("cross_entropy", rows_kernel, {dim3(static_cast<unsigned>(x.rows)), dim3(kThreads)}, on,
           x, lse, losses);
  }
  launch("cross_entropy_mean", mean_kernel, {dim3(1), dim3(kThreads)}, on, losses, x.rows, items,
         loss);
}

void cross_entropy_gradient(const LogitRows& x, const float* lse, const float* g, double items,
                            void* dx, std::int64_t dx_stride, bool accumulate, void* stream) {
  launch_runs("cross_entropy_gradient",
              Gradient{x, lse, g, items, {dx, x.dtype, dx_stride}, accumulate},
              {x.rows, x.vocabulary}, stream);
}

}  // namespace reprise::kernels::cuda
