// What the kernels of cross_entropy.cu and linear_cross_entropy.cu share: a block takes a row of
// logits.
#pragma once

#include "kernels/cross_entropy_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {

inline constexpr int kThreads = 256;

__device__ __forceinline__ bool is_counted(const LogitRows& x, std::int64_t label) {
  return label != x.ignore_index && label >= 0 && label < x.vocabulary;
}

__device__ __forceinline__ double number_of(const LossItems& items) {
  return items.counted != nullptr ? static_cast<double>(*items.counted) : items.number;
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

// log sum exp of a row whose label is not ignored; all threads of the block take part.
__device__ __forceinline__ float row_lse(const LogitRows& x, std::int64_t row) {
  const Partial part = partial_of({x.at, x.dtype, x.row_stride}, row, x.vocabulary);
  const float max = block_max(part.max);
  const float sum = block_sum<kThreads>(
      part.max == -INFINITY ? part.sum : part.sum * probability(part.max - max));
  return max + logf(sum);
}

// factor * (softmax - onehot) of the run of logits that starts at `column`.
__device__ __forceinline__ Run gradient_run(Run run, std::int64_t column, std::int64_t label,
                                            float lse, float factor) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    // Not the exponential less 1: that cancels where the label is nearly certain.
    run.at[i] =
        factor * (column + i == label ? expm1f(run.at[i] - lse) : probability(run.at[i] - lse));
    // Of an infinite lse the differences need not be NaN.
    run.at[i] += lse - lse;
  }
  return run;
}

}  // namespace reprise::kernels::cuda
