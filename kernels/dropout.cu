#include "kernels/dropout_sides.h"
#include "kernels/matrix.cuh"
#include "kernels/philox.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Dropout {
  Matrix x, y;
  DropoutMask mask;
  bool accumulate;
  std::int64_t width;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    const std::int64_t index = row * width + column;
    const int skip = static_cast<int>(index % 4);
    const std::uint64_t first = mask.offset + static_cast<std::uint64_t>(index / 4);
    const Words a = philox(mask.seed, first), b = philox(mask.seed, first + 1);
    Words c = {};
    if (skip > 0) {
      c = philox(mask.seed, first + 2);
    }
    const std::uint32_t words[12] = {a.at[0], a.at[1], a.at[2], a.at[3], b.at[0], b.at[1],
                                     b.at[2], b.at[3], c.at[0], c.at[1], c.at[2], c.at[3]};
    Run run = load_run(x, row, column, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      // Not words[i + skip]: an index that is not known puts an array into memory.
      const std::uint32_t word = skip == 0   ? words[i]
                                 : skip == 1 ? words[i + 1]
                                 : skip == 2 ? words[i + 2]
                                             : words[i + 3];
      run.at[i] = (word >> 8) < mask.threshold ? 0.0f : run.at[i] * mask.scale;
    }
    store_run(y, row, column, count, run, accumulate);
  }
};

}  // namespace

void dropout(const Matrix& x, const DropoutMask& mask, const Matrix& y, bool accumulate,
             MatrixSize size, void* stream) {
  launch_runs("dropout", Dropout{x, y, mask, accumulate, size.width}, size, stream);
}

}  // namespace reprise::kernels::cuda
