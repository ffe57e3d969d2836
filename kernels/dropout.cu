#include "kernels/dropout.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Dropout {
  Matrix x, y;
  DropoutMask mask;
  bool accumulate;
  std::int64_t width;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    store_run(y, row, column, count,
              drop(mask, row * width + column, load_run(x, row, column, count)), accumulate);
  }
};

}  // namespace

void dropout(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
             MatrixSize size, void* stream) {
  launch_runs("dropout", Dropout{x, y, mask, accumulate, size.width}, size, stream);
}

}  // namespace reprise::kernels::cuda
