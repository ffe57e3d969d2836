#include "kernels/cross_entropy.cuh"

namespace reprise::kernels::cuda {
namespace {

// A block takes a row.
__global__ void __launch_bounds__(kThreads) rows_kernel(LogitRows x, float* lses, float* losses) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t label = x.labels[row];
  const Matrix logits{x.at, x.dtype, x.row_stride};
  float lse = 0.0f, loss = 0.0f;
  if (is_counted(x, label)) {  // the same for all threads
    lse = row_lse(x, row);
    loss = lse - load_one(logits, row, label);
  }
  if (threadIdx.x == 0) {
    if (lses != nullptr) {
      lses[row] = lse;
    }
    losses[row] = loss;
  }
}

// One block: each thread adds every 256th loss, then their sums are added in order.
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* losses, std::int64_t count, LossItems items, float* loss) {
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
    *loss = static_cast<float>(total / number_of(items));
  }
}

struct Gradient {
  LogitRows x;
  const float* lses;
  const float* g;
  LossItems items;
  Matrix dx;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const std::int64_t label = x.labels[row];
    if (!is_counted(x, label)) {
      if (!accumulate) {
        store_run(dx, row, column, count, Run{});
      }
      return;
    }
    const float lse = lses[row];
    const float factor = static_cast<float>(static_cast<double>(*g) / number_of(items));
    const Run logits = load_run({x.at, x.dtype, x.row_stride}, row, column, count);
    const Run run = gradient_run(logits, column, label, lse, factor);
    store_run(dx, row, column, count, run, accumulate);
  }
};

}  // namespace

void cross_entropy_rows(const LogitRows& x, float* lse, float* losses, void* stream) {
  if (x.rows > 0) {
    launch("cross_entropy", rows_kernel, {dim3(static_cast<unsigned>(x.rows)), dim3(kThreads)},
           static_cast<cudaStream_t>(stream), x, lse, losses);
  }
}

void mean_of_losses(const float* losses, std::int64_t rows, const LossItems& items, float* loss,
                    void* stream) {
  launch("cross_entropy_mean", mean_kernel, {dim3(1), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), losses, rows, items, loss);
}

void cross_entropy_gradient(const LogitRows& x, const float* lse, const float* g,
                            const LossItems& items, void* dx, std::int64_t dx_stride,
                            bool accumulate, void* stream) {
  launch_runs("cross_entropy_gradient",
              Gradient{x, lse, g, items, {dx, x.dtype, dx_stride}, accumulate},
              {x.rows, x.vocabulary}, stream);
}

}  // namespace reprise::kernels::cuda
