#include "kernels/device.cuh"
#include "kernels/tokens_sides.h"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) shift_kernel(NextLabels call) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < call.rows * call.tokens) {
    call.targets[i] = (i + 1) % call.tokens == 0 ? kNoTarget : call.labels[i + 1];
  }
}

__global__ void __launch_bounds__(kThreads) end_kernel(NextLabels call) {
  const std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n < call.end_count) {
    const std::int64_t i = call.ends[n];
    if (i >= 0 && i < call.rows * call.tokens) {
      call.targets[i] = kNoTarget;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(std::int64_t* positions, std::int64_t count, std::int64_t tokens) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    positions[i] = i % tokens;
  }
}

dim3 blocks_of(std::int64_t count) {
  return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads));
}

}  // namespace

void next_labels(const NextLabels& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  launch("next_labels", shift_kernel, {blocks_of(call.rows * call.tokens), dim3(kThreads)}, on,
         call);
  if (call.end_count > 0) {
    launch("next_labels_ends", end_kernel, {blocks_of(call.end_count), dim3(kThreads)}, on, call);
  }
}

void count_positions(std::int64_t* positions, std::int64_t rows, std::int64_t tokens,
                     void* stream) {
  launch("count_positions", count_kernel, {blocks_of(rows * tokens), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), positions, rows * tokens, tokens);
}

}  // namespace reprise::kernels::cuda
