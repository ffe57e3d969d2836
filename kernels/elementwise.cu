#include "kernels/column_sums.cuh"
#include "kernels/elementwise_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Mul {
  Matrix x, r, y;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
    const Run other = load_run(r, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= other.at[i];
    }
    store_run(y, row, column, count, run, accumulate);
  }
};

struct Scale {
  Matrix x, y;
  float factor;
  bool accumulate;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] *= factor;
    }
    store_run(y, row, column, count, run, accumulate);
  }
};

struct AddBias {
  Matrix x, bias, y;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run run = load_run(x, row, column, count);
    const Run other = load_run(bias, 0, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.at[i] += other.at[i];
    }
    store_run(y, row, column, count, run);
  }
};

struct Elements {
  Matrix x;
  __device__ Run operator()(std::int64_t row, std::int64_t column, int count) const {
    return load_run(x, row, column, count);
  }
};

}  // namespace

void mul(const Matrix& x, const Matrix& r, const Matrix& y, bool accumulate, MatrixSize size,
         void* stream) {
  launch_runs("mul", Mul{x, r, y, accumulate}, size, stream);
}

void scale(const Matrix& x, float factor, const Matrix& y, bool accumulate, MatrixSize size,
           void* stream) {
  launch_runs("scale", Scale{x, y, factor, accumulate}, size, stream);
}

void add_bias(const Matrix& x, const Matrix& bias, const Matrix& y, MatrixSize size, void* stream) {
  launch_runs("add_bias", AddBias{x, bias, y}, size, stream);
}

void bias_gradient(const Matrix& dy, const Matrix& dbias, bool accumulate, MatrixSize size,
                   float* partial, void* stream) {
  launch_column_sums("bias_gradient", Elements{dy}, size, dbias, accumulate, partial, stream);
}

}  // namespace reprise::kernels::cuda
