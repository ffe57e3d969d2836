// What elementwise CUDA kernels are written with: a thread takes a run of 8 elements of a row of
// each matrix, f32 or bf16, in packets of 128 bits where the addresses allow. Arithmetic is in f32;
// an element meets the same operations wherever it lies.
#pragma once

#include "kernels/device.cuh"
#include "kernels/matrix_sides.h"

namespace reprise::kernels::cuda {

inline constexpr int kRun = 8;
struct Run {
  float at[kRun];
};

__device__ __forceinline__ bool is_packet_aligned(const void* at) {
  return reinterpret_cast<std::uintptr_t>(at) % 16 == 0;
}

// The first `count` elements; the others are 0.
template <class T>
__device__ __forceinline__ Run load_elements(const T* from, int count) {
  constexpr int n = kPacket<T>;
  Run run = {};
  if (count == kRun && is_packet_aligned(from)) {
#pragma unroll
    for (int first = 0; first < kRun; first += n) {
      const Packet<T, n> packet = load_packet<n>(from + first);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        run.at[first + i] = to_float(packet.at[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) {
        run.at[i] = to_float(from[i]);
      }
    }
  }
  return run;
}

template <class T>
__device__ __forceinline__ void store_elements(T* to, int count, const Run& run) {
  constexpr int n = kPacket<T>;
  if (count == kRun && is_packet_aligned(to)) {
#pragma unroll
    for (int first = 0; first < kRun; first += n) {
      Packet<T, n> packet;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        packet.at[i] = from_float<T>(run.at[first + i]);
      }
      store_packet(to + first, packet);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) {
        to[i] = from_float<T>(run.at[i]);
      }
    }
  }
}

// As the dtype would hold it.
__device__ __forceinline__ float rounded(DType dtype, float value) {
  return dtype == DType::f32 ? value : to_float(from_float<__nv_bfloat16>(value));
}

__device__ __forceinline__ Run load_run(const Matrix& x, std::int64_t row, std::int64_t column,
                                        int count) {
  const std::int64_t at = row * x.row_stride + column;
  return x.dtype == DType::f32 ? load_elements(static_cast<const float*>(x.at) + at, count)
                               : load_elements(static_cast<const __nv_bfloat16*>(x.at) + at, count);
}
__device__ __forceinline__ float load_one(const Matrix& x, std::int64_t row, std::int64_t column) {
  const std::int64_t at = row * x.row_stride + column;
  return x.dtype == DType::f32 ? static_cast<const float*>(x.at)[at]
                               : to_float(static_cast<const __nv_bfloat16*>(x.at)[at]);
}

// With `accumulate` the run is added to what is there, before the rounding.
__device__ __forceinline__ void store_run(const Matrix& y, std::int64_t row, std::int64_t column,
                                          int count, Run run, bool accumulate = false) {
  if (accumulate) {
    const Run before = load_run(y, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] = before.at[i] + run.at[i];
    }
  }
  const std::int64_t at = row * y.row_stride + column;
  if (y.dtype == DType::f32) {
    store_elements(static_cast<float*>(y.at) + at, count, run);
  } else {
    store_elements(static_cast<__nv_bfloat16*>(y.at) + at, count, run);
  }
}
__device__ __forceinline__ void store_one(const Matrix& y, std::int64_t row, std::int64_t column,
                                          float value, bool accumulate = false) {
  if (accumulate) {
    value = load_one(y, row, column) + value;
  }
  const std::int64_t at = row * y.row_stride + column;
  if (y.dtype == DType::f32) {
    static_cast<float*>(y.at)[at] = value;
  } else {
    static_cast<__nv_bfloat16*>(y.at)[at] = from_float<__nv_bfloat16>(value);
  }
}

inline constexpr int kRunThreads = 256;

template <class F>
__global__ void __launch_bounds__(kRunThreads)
    runs_kernel(F f, MatrixSize size, std::int64_t per_row) {
  const std::int64_t run = static_cast<std::int64_t>(blockIdx.x) * kRunThreads + threadIdx.x;
  if (run < size.rows * per_row) {
    const std::int64_t row = per_row == 1 ? run : run / per_row;
    const std::int64_t column = (run - row * per_row) * kRun;
    const std::int64_t left = size.width - column;
    f(row, column, left < kRun ? static_cast<int>(left) : kRun);
  }
}

// Calls f(row, first column, number of elements) on the device for all runs of a matrix. f is a
// struct of what the call needs, with a __device__ operator().
template <class F>
void launch_runs(const char* name, F f, MatrixSize size, void* stream) {
  const std::int64_t per_row = (size.width + kRun - 1) / kRun;
  const std::int64_t blocks = (size.rows * per_row + kRunThreads - 1) / kRunThreads;
  if (blocks > 0) {
    launch(name, runs_kernel<F>, {dim3(static_cast<unsigned>(blocks)), dim3(kRunThreads)},
           static_cast<cudaStream_t>(stream), f, size, per_row);
  }
}

}  // namespace reprise::kernels::cuda
