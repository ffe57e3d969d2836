#include "kernels/elementwise.h"

#include "core/cuda_device.h"
#include "kernels/column_sums_workspace.h"
#include "kernels/elementwise_sides.h"
#include "kernels/matrix.h"

namespace reprise::kernels {

void mul(const Tensor& x, const Tensor& r, const Tensor& y, bool accumulate) {
  expect_trainable("mul", "x", x);
  expect_dtype("mul", "r", r, x.dtype());
  expect_trainable("mul", "y", y);
  expect_like("mul", "r", r, x, "x");
  expect_like("mul", "y", y, x, "x");
  const Matrix from = matrix("mul", "x", x), other = matrix("mul", "r", r),
               to = matrix("mul", "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("mul", cuda::mul(from, other, to, accumulate, merged_size({&x, &r, &y}),
                                       cuda_stream(x.device())));
    return;
  }
  cpu::mul(from, other, to, accumulate, merged_size({&x, &r, &y}));
}

void scale(const Tensor& x, double factor, const Tensor& y, bool accumulate) {
  expect_trainable("scale", "x", x);
  expect_trainable("scale", "y", y);
  expect_like("scale", "y", y, x, "x");
  const Matrix from = matrix("scale", "x", x), to = matrix("scale", "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("scale", cuda::scale(from, static_cast<float>(factor), to, accumulate,
                                           merged_size({&x, &y}), cuda_stream(x.device())));
    return;
  }
  cpu::scale(from, static_cast<float>(factor), to, accumulate, merged_size({&x, &y}));
}

void add_bias(const Tensor& x, const Tensor& bias, const Tensor& y) {
  expect_trainable("add_bias", "x", x);
  if (x.rank() == 0) {
    fail("add_bias", "x must be [.., C], got a scalar");
  }
  expect_dtype("add_bias", "bias", bias, x.dtype());
  expect_shape("add_bias", "bias", bias, {x.shape().back()}, "[C]");
  expect_device("add_bias", "bias", bias, x.device());
  expect_contiguous("add_bias", "bias", bias);
  expect_dtype("add_bias", "y", y, x.dtype());
  expect_like("add_bias", "y", y, x, "x");
  const Matrix from = matrix("add_bias", "x", x), row = matrix("add_bias", "bias", bias),
               to = matrix("add_bias", "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("add_bias",
                      cuda::add_bias(from, row, to, {x.shape().rows(), x.shape().back()},
                                     cuda_stream(x.device())));
    return;
  }
  cpu::add_bias(from, row, to, {x.shape().rows(), x.shape().back()});
}

void bias_gradient(const Tensor& dy, const Tensor& dbias, bool accumulate) {
  expect_trainable("add_bias", "dy", dy);
  if (dy.rank() == 0) {
    fail("add_bias", "dy must be [.., C], got a scalar");
  }
  expect_trainable("add_bias", "dbias", dbias);
  expect_shape("add_bias", "dbias", dbias, {dy.shape().back()}, "[C]");
  expect_device("add_bias", "dbias", dbias, dy.device());
  expect_contiguous("add_bias", "dbias", dbias);
  const Matrix from = matrix("add_bias", "dy", dy), to = matrix("add_bias", "dbias", dbias);
  const MatrixSize size{dy.shape().rows(), dy.shape().back()};
  const Tensor partial = column_sum_workspace(size, dy.device());
  if (dy.is_meta() || dbias.numel() == 0) {
    return;
  }
  if (dy.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("add_bias",
                      cuda::bias_gradient(from, to, accumulate, size, partial.data<float>(),
                                          cuda_stream(dy.device())));
    return;
  }
  cpu::bias_gradient(from, to, accumulate, size);
}

}  // namespace reprise::kernels
