#include "kernels/resize.h"

#include <string_view>

#include "core/cuda_device.h"
#include "kernels/matrix.h"
#include "kernels/resize_sides.h"

namespace reprise::kernels {
namespace {

void expect_image(std::string_view operation, std::string_view argument, const Tensor& x,
                  std::string_view letters) {
  expect_trainable(operation, argument, x);
  if (x.rank() != 3 || x.size(0) == 0 || x.size(1) == 0) {
    fail(operation, "{} must be {} with one row and column at least, got {}", argument, letters,
         to_string(x.shape()));
  }
}

// `x` [H, W, C] and `y` [height, width, C], or their gradients.
ResizeCall check(std::string_view operation, std::string_view x_argument, const Tensor& x,
                 std::string_view y_argument, const Tensor& y) {
  expect_image(operation, x_argument, x, "[H, W, C]");
  expect_image(operation, y_argument, y, "[height, width, C]");
  if (x.size(2) != y.size(2)) {
    fail(operation, "{} must have C = {} channels, got {}", y_argument, x.size(2), y.size(2));
  }
  expect_device(operation, y_argument, y, x.device());
  return {{x.size(0), y.size(0)}, {x.size(1), y.size(1)}, x.size(2)};
}

}  // namespace

void resize_bicubic(const Tensor& x, const Tensor& y) {
  constexpr std::string_view kName = "resize_bicubic";
  const ResizeCall call = check(kName, "x", x, "y", y);
  expect_dtype(kName, "y", y, x.dtype());
  const Matrix from = matrix(kName, "x", x), to = matrix(kName, "y", y);
  if (x.is_meta() || y.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(kName, cuda::resize_bicubic(from, to, call, cuda_stream(x.device())));
    return;
  }
  cpu::resize_bicubic(from, to, call);
}

void resize_bicubic_gradient(const Tensor& dy, const Tensor& dx, bool accumulate) {
  constexpr std::string_view kName = "resize_bicubic_gradient";
  const ResizeCall call = check(kName, "dx", dx, "dy", dy);
  const Matrix from = matrix(kName, "dy", dy), to = matrix(kName, "dx", dx);
  if (dx.is_meta() || dx.numel() == 0) {
    return;
  }
  if (dx.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(
        kName, cuda::resize_bicubic_gradient(from, to, accumulate, call, cuda_stream(dx.device())));
    return;
  }
  cpu::resize_bicubic_gradient(from, to, accumulate, call);
}

}  // namespace reprise::kernels
