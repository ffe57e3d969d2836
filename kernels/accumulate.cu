#include "kernels/accumulate_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Cast {
  Matrix x, y;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    store_run(y, row, column, count, load_run(x, row, column, count));
  }
};

struct Add {
  Matrix x, r, y;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    Run sum = load_run(x, row, column, count);
    const Run other = load_run(r, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      sum.at[i] += other.at[i];
    }
    store_run(y, row, column, count, sum);
  }
};

}  // namespace

void cast(const Matrix& x, const Matrix& y, MatrixSize size, void* stream) {
  launch_runs("cast", Cast{x, y}, size, stream);
}

void add(const Matrix& x, const Matrix& r, const Matrix& y, MatrixSize size, void* stream) {
  launch_runs("add", Add{x, r, y}, size, stream);
}

}  // namespace reprise::kernels::cuda
