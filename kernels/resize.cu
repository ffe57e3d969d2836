#include "kernels/matrix.cuh"
#include "kernels/resize_sides.h"

namespace reprise::kernels::cuda {
namespace {

__device__ __forceinline__ void add_scaled(Run& sum, const Run& x, float weight) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    sum.at[i] += weight * x.at[i];
  }
}

struct Resize {
  Matrix x, y;
  ResizeCall call;
  __device__ void operator()(std::int64_t pixel, std::int64_t channel, int count) const {
    const Taps rows = taps_of(call.height, pixel / call.width.to);
    const Taps columns = taps_of(call.width, pixel % call.width.to);
    Run sum = {};
#pragma unroll 1
    for (int a = 0; a < 4; ++a) {
      const std::int64_t row = element_of(call.height, rows, a) * call.width.from;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const std::int64_t at = row + element_of(call.width, columns, b);
        add_scaled(sum, load_run(x, at, channel, count), rows.weight[a] * columns.weight[b]);
      }
    }
    store_run(y, pixel, channel, count, sum);
  }
};

struct Gradient {
  Matrix dy, dx;
  bool accumulate;
  ResizeCall call;
  __device__ void operator()(std::int64_t pixel, std::int64_t channel, int count) const {
    const std::int64_t p = pixel / call.width.from, q = pixel % call.width.from;
    const Readers rows = readers_of(call.height, p), columns = readers_of(call.width, q);
    Run sum = {};
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
      const float row = weight_of(call.height, taps_of(call.height, i), p);
      for (std::int64_t j = columns.begin; j < columns.end; ++j) {
        const float weight = row * weight_of(call.width, taps_of(call.width, j), q);
        add_scaled(sum, load_run(dy, i * call.width.to + j, channel, count), weight);
      }
    }
    store_run(dx, pixel, channel, count, sum, accumulate);
  }
};

}  // namespace

void resize_bicubic(const Matrix& x, const Matrix& y, const ResizeCall& call, void* stream) {
  launch_runs("resize_bicubic", Resize{x, y, call}, {call.height.to * call.width.to, call.channels},
              stream);
}

void resize_bicubic_gradient(const Matrix& dy, const Matrix& dx, bool accumulate,
                             const ResizeCall& call, void* stream) {
  launch_runs("resize_bicubic_gradient", Gradient{dy, dx, accumulate, call},
              {call.height.from * call.width.from, call.channels}, stream);
}

}  // namespace reprise::kernels::cuda
