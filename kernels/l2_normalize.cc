#include "kernels/l2_normalize.h"

#include <string_view>

#include "core/cuda_device.h"
#include "kernels/l2_normalize_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {
namespace {

constexpr std::string_view kForward = "l2_normalize", kBackward = "l2_normalize_backward";

// x, or dy.
MatrixSize check(std::string_view operation, std::string_view argument, const Tensor& x,
                 const Tensor& scale) {
  expect_trainable(operation, argument, x);
  if (x.rank() == 0) {
    fail(operation, "{} must be [.., C], got a scalar", argument);
  }
  const Shape rows(x.shape().sizes().first(static_cast<std::size_t>(x.rank() - 1)));
  expect_dtype(operation, "scale", scale, DType::f32);
  expect_shape(operation, "scale", scale, rows, "[..]");
  expect_device(operation, "scale", scale, x.device());
  expect_contiguous(operation, "scale", scale);
  return {x.shape().rows(), x.shape().back()};
}

}  // namespace

void l2_normalize(const Tensor& x, const Tensor& y, const Tensor& scale) {
  const MatrixSize size = check(kForward, "x", x, scale);
  expect_dtype(kForward, "y", y, x.dtype());
  expect_like(kForward, "y", y, x, "x");
  const Matrix from = matrix(kForward, "x", x), to = matrix(kForward, "y", y);
  if (x.is_meta() || size.rows == 0) {
    return;
  }
  auto* scales = scale.data<float>();
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(kForward,
                      cuda::l2_normalize(from, to, scales, size, cuda_stream(x.device())));
    return;
  }
  cpu::l2_normalize(from, to, scales, size);
}

void l2_normalize_backward(const Tensor& dy, const Tensor& y, const Tensor& scale, const Tensor& dx,
                           bool accumulate) {
  const MatrixSize size = check(kBackward, "dy", dy, scale);
  expect_dtype(kBackward, "y", y, dy.dtype());
  expect_like(kBackward, "y", y, dy, "dy");
  expect_trainable(kBackward, "dx", dx);
  expect_like(kBackward, "dx", dx, dy, "dy");
  const Matrix gradient = matrix(kBackward, "dy", dy), unit = matrix(kBackward, "y", y),
               to = matrix(kBackward, "dx", dx);
  if (dy.is_meta() || dy.numel() == 0) {
    return;
  }
  const auto* scales = scale.data<float>();
  if (dy.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(kBackward, cuda::l2_normalize_backward(gradient, unit, scales, to, accumulate,
                                                             size, cuda_stream(dy.device())));
    return;
  }
  cpu::l2_normalize_backward(gradient, unit, scales, to, accumulate, size);
}

}  // namespace reprise::kernels
