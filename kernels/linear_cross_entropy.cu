// The products are cuBLASLt's (matmul.cu); here is what happens to a chunk of logits between them.
#include "kernels/cross_entropy.cuh"

namespace reprise::kernels::cuda {
namespace {

// A block takes a row, which it reads again while it is in the cache.
__global__ void __launch_bounds__(kThreads)
    in_place_kernel(LogitRows x, LossItems items, float* losses) {
  const std::int64_t row = blockIdx.x, label = x.labels[row];
  const Matrix logits{x.at, x.dtype, x.row_stride};
  const bool counts = is_counted(x, label);  // the same for all threads
  const float factor = static_cast<float>(1 / number_of(items));
  float lse = 0.0f;
  if (counts) {
    lse = row_lse(x, row);
    if (threadIdx.x == 0) {
      losses[row] = lse - load_one(logits, row, label);
    }
    __syncthreads();  // the label's logit has been read
  } else if (threadIdx.x == 0) {
    losses[row] = 0.0f;
  }
  for (std::int64_t column = threadIdx.x * kRun; column < x.vocabulary; column += kThreads * kRun) {
    const int count = x.vocabulary - column < kRun ? static_cast<int>(x.vocabulary - column) : kRun;
    Run run = {};
    if (counts) {
      run = gradient_run(load_run(logits, row, column, count), column, label, lse, factor);
    }
    store_run(logits, row, column, count, run);
  }
}

}  // namespace

void cross_entropy_in_place(const LogitRows& x, const LossItems& items, float* losses,
                            void* stream) {
  if (x.rows > 0) {
    launch("linear_cross_entropy", in_place_kernel,
           {dim3(static_cast<unsigned>(x.rows)), dim3(kThreads)}, static_cast<cudaStream_t>(stream),
           x, items, losses);
  }
}

}  // namespace reprise::kernels::cuda
