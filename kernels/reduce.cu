#include "kernels/matrix.cuh"
#include "kernels/reduce_sides.h"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Elements [first, first + count) in order of the rows: the same lie in a run whatever the stride.
__device__ __forceinline__ Run load_elements_of(const Elements& x, std::int64_t first, int count) {
  const Matrix matrix{const_cast<void*>(x.at), x.dtype, x.row_stride};
  if (x.count == x.width) {
    return load_run(matrix, 0, first, count);
  }
  Run run = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < count) {
      run.at[i] = load_one(matrix, (first + i) / x.width, (first + i) % x.width);
    }
  }
  return run;
}

// The sum of a block's values, in every thread's order: a tree.
__device__ __forceinline__ double block_total(double value) {
  __shared__ double of_thread[kThreads];
  of_thread[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
    }
  }
  __syncthreads();
  return of_thread[0];
}

// A block adds a chunk: 64 elements a thread in f32, the threads' sums in f64.
__global__ void __launch_bounds__(kThreads)
    chunks_kernel(Elements x, bool squares, double* partial) {
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kChunkElements;
  const std::int64_t end = begin + kChunkElements < x.count ? begin + kChunkElements : x.count;
  float sum = 0.0f;
  for (std::int64_t at = begin + threadIdx.x * kRun; at < end; at += kThreads * kRun) {
    const Run run = load_elements_of(x, at, end - at < kRun ? static_cast<int>(end - at) : kRun);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      sum += squares ? run.at[i] * run.at[i] : run.at[i];
    }
  }
  const double total = block_total(static_cast<double>(sum));
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* partial, std::int64_t chunks, double factor, DType out_dtype,
                 void* out) {
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    sum += partial[i];
  }
  const double total = factor * block_total(sum);
  if (threadIdx.x == 0) {
    if (out_dtype == DType::f64) {
      *static_cast<double*>(out) = total;
    } else {
      *static_cast<float*>(out) = static_cast<float>(total);
    }
  }
}

struct AddConstant {
  Matrix dx;
  const float* g;
  double factor;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const float value = static_cast<float>(factor * static_cast<double>(*g));
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] = value;
    }
    store_run(dx, row, column, count, run, accumulate);
  }
};

struct AddScaled {
  Elements x;
  Matrix y;
  const float* g;
  double factor;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const float by = static_cast<float>(factor * static_cast<double>(*g));
    Run run = load_run({const_cast<void*>(x.at), x.dtype, x.row_stride}, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= by;
    }
    store_run(y, row, column, count, run, accumulate);
  }
};

struct Scale {
  Matrix x;
  float factor;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= factor;
    }
    store_run(x, row, column, count, run);
  }
};

}  // namespace

void reduce(const Elements& x, bool squares, double factor, double* partial, DType out_dtype,
            void* out, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::int64_t chunks = (x.count + kChunkElements - 1) / kChunkElements;
  if (chunks > 0) {
    launch("sum_chunks", chunks_kernel, {dim3(static_cast<unsigned>(chunks)), dim3(kThreads)}, on,
           x, squares, partial);
  }
  launch("sum", total_kernel, {dim3(1), dim3(kThreads)}, on, partial, chunks, factor, out_dtype,
         out);
}

void add_constant(DType dtype, void* dx, std::int64_t count, const float* g, double factor,
                  bool accumulate, void* stream) {
  launch_runs("sum_backward", AddConstant{{dx, dtype, count}, g, factor, accumulate}, {1, count},
              stream);
}

void add_scaled(const Elements& x, const float* g, double factor, DType y_dtype, void* y,
                bool accumulate, void* stream) {
  const std::int64_t rows = x.width == 0 ? 0 : x.count / x.width;
  launch_runs("sum_squares_backward", AddScaled{x, {y, y_dtype, x.width}, g, factor, accumulate},
              {rows, x.width}, stream);
}

void scale_all(DType dtype, void* x, std::int64_t count, float factor, void* stream) {
  launch_runs("scale_all", Scale{{x, dtype, count}, factor}, {1, count}, stream);
}

}  // namespace reprise::kernels::cuda
