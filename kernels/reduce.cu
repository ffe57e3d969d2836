#include "kernels/list.cuh"
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

// The sum of a chunk by a block: 64 elements a thread in f32, the threads' sums in f64.
__device__ __forceinline__ double chunk_total(const Elements& x, bool squares, std::int64_t chunk) {
  const std::int64_t begin = chunk * kChunkElements;
  const std::int64_t end = begin + kChunkElements < x.count ? begin + kChunkElements : x.count;
  float sum = 0.0f;
  for (std::int64_t at = begin + threadIdx.x * kRun; at < end; at += kThreads * kRun) {
    const Run run = load_elements_of(x, at, end - at < kRun ? static_cast<int>(end - at) : kRun);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      sum += squares ? run.at[i] * run.at[i] : run.at[i];
    }
  }
  return block_total(static_cast<double>(sum));
}

__global__ void __launch_bounds__(kThreads)
    chunks_kernel(Elements x, bool squares, double* partial) {
  const double total = chunk_total(x, squares, blockIdx.x);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    list_chunks_kernel(const __grid_constant__ Listed<Elements> list, double* partial) {
  const int i = listed_at(list, static_cast<int>(blockIdx.x));
  const double total =
      chunk_total(list.items[i], true, static_cast<int>(blockIdx.x) - list.firsts[i]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total;
  }
}

__device__ __forceinline__ void write_total(const double* partial, std::int64_t chunks,
                                            double factor, DType out_dtype, void* out,
                                            std::int64_t place) {
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    sum += partial[i];
  }
  const double total = factor * block_total(sum);
  if (threadIdx.x == 0) {
    if (out_dtype == DType::f64) {
      static_cast<double*>(out)[place] = total;
    } else {
      static_cast<float*>(out)[place] = static_cast<float>(total);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* partial, std::int64_t chunks, double factor, DType out_dtype,
                 void* out) {
  write_total(partial, chunks, factor, out_dtype, out, 0);
}

// A block a tensor.
__global__ void __launch_bounds__(kThreads)
    list_totals_kernel(const __grid_constant__ Listed<Elements> list, const double* partial,
                       DType out_dtype, void* out, std::int64_t place) {
  const int i = static_cast<int>(blockIdx.x), first = list.firsts[i];
  write_total(partial + first, list.firsts[i + 1] - first, 1.0, out_dtype, out, place + i);
}

__global__ void __launch_bounds__(kThreads)
    list_scale_kernel(const __grid_constant__ Listed<Elements> list, float factor) {
  const int i = listed_at(list, static_cast<int>(blockIdx.x));
  const Elements& x = list.items[i];
  const Matrix matrix{const_cast<void*>(x.at), x.dtype, x.count};
  const std::int64_t begin =
      (static_cast<int>(blockIdx.x) - list.firsts[i]) * static_cast<std::int64_t>(kChunkElements);
  const std::int64_t end = begin + kChunkElements < x.count ? begin + kChunkElements : x.count;
  for (std::int64_t at = begin + threadIdx.x * kRun; at < end; at += kThreads * kRun) {
    const int count = end - at < kRun ? static_cast<int>(end - at) : kRun;
    Run run = load_run(matrix, 0, at, count);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      run.at[k] *= factor;
    }
    store_run(matrix, 0, at, count, run);
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

void squared_norms(std::span<const Elements> tensors, double* partial, DType out_dtype, void* out,
                   void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  std::int64_t place = 0;
  for_lists(tensors, kChunkElements, [&](const Listed<Elements>& list, int chunks) {
    if (chunks > 0) {
      launch("squared_norms_chunks", list_chunks_kernel,
             {dim3(static_cast<unsigned>(chunks)), dim3(kThreads)}, on, list, partial);
    }
    launch("squared_norms", list_totals_kernel,
           {dim3(static_cast<unsigned>(list.count)), dim3(kThreads)}, on, list, partial, out_dtype,
           out, place);
    partial += chunks;
    place += list.count;
  });
}

void scale_all(std::span<const Elements> tensors, float factor, void* stream) {
  for_lists(tensors, kChunkElements, [&](const Listed<Elements>& list, int chunks) {
    if (chunks > 0) {
      launch("scale_all", list_scale_kernel, {dim3(static_cast<unsigned>(chunks)), dim3(kThreads)},
             static_cast<cudaStream_t>(stream), list, factor);
    }
  });
}

}  // namespace reprise::kernels::cuda
