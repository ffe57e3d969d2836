#include "kernels/adamw_sides.h"
#include "kernels/list.cuh"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Step {
  AdamWRun run;
  AdamWScalars c;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const Matrix value{run.value, run.value_dtype, 0}, master{run.master, DType::f32, 0};
    const Matrix first{run.m, run.state_dtype, 0}, second{run.v, run.state_dtype, 0};
    const bool has_master = run.master != nullptr;
    Run p = load_run(has_master ? master : value, row, column, count);
    Run m = load_run(first, row, column, count), v = load_run(second, row, column, count);
    const Run gradient =
        load_run({const_cast<void*>(run.gradient), run.gradient_dtype, 0}, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float g = gradient.at[i] * c.gradient_scale;
      const float difference = g - m.at[i];
      // The form of lerp whose rounding vanishes at its nearer end.
      m.at[i] = c.beta1_rest < 0.5f ? c.beta1_rest * difference + m.at[i]
                                    : g - difference * (1 - c.beta1_rest);
      v.at[i] = c.beta2_rest * g * g + v.at[i] * c.beta2;
      const float denominator = sqrtf(v.at[i]) / c.correction2_root + c.epsilon;
      p.at[i] = p.at[i] * c.keep + c.minus_step_size * m.at[i] / denominator;
    }
    if (has_master) {
      store_run(master, row, column, count, p);
    }
    store_run(value, row, column, count, p);
    store_run(first, row, column, count, m);
    store_run(second, row, column, count, v);
  }
};

constexpr int kThreads = 256;

// A block a chunk.
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Listed<AdamWItem> list) {
  const int chunk = static_cast<int>(blockIdx.x);
  const int i = listed_at(list, chunk);
  const AdamWItem& item = list.items[i];
  const std::int64_t begin = (chunk - list.firsts[i]) * kAdamWChunkElements;
  const std::int64_t after = begin + kAdamWChunkElements;
  const std::int64_t end = after < item.count ? after : item.count;
  const Step step{item.run, item.in_memory == nullptr ? item.scalars : *item.in_memory};
  if (isnan(step.c.gradient_scale)) {
    return;
  }
  for (std::int64_t at = begin + threadIdx.x * kRun; at < end; at += kThreads * kRun) {
    step(0, at, end - at < kRun ? static_cast<int>(end - at) : kRun);
  }
}

// One block.
__global__ void __launch_bounds__(kThreads) gradient_scale_kernel(AdamWOutcome of) {
  __shared__ float scale;
  if (threadIdx.x == 0) {
    scale = adamw_scale_of(of);
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < of.rows; i += kThreads) {
    of.scalars[i].gradient_scale = scale;
  }
}

}  // namespace

void adamw_gradient_scale(const AdamWOutcome& of, void* stream) {
  launch("adamw_gradient_scale", gradient_scale_kernel, {dim3(1), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), of);
}

void adamw(std::span<const AdamWItem> items, void* stream) {
  for_lists(items, kAdamWChunkElements, [&](const Listed<AdamWItem>& list, int chunks) {
    if (chunks > 0) {
      launch("adamw", adamw_kernel, {dim3(static_cast<unsigned>(chunks)), dim3(kThreads)},
             static_cast<cudaStream_t>(stream), list);
    }
  });
}

}  // namespace reprise::kernels::cuda
