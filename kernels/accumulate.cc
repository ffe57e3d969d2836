#include "kernels/accumulate.h"

#include <string_view>

#include "kernels/accumulate_cpu.h"
#include "kernels/dispatch.h"

namespace reprise::kernels {
namespace {

void expect_floating(std::string_view operation, std::string_view argument, const Tensor& tensor) {
  if (!is_floating(tensor.dtype())) {
    fail(operation, "{} must be f32, bf16 or f64, got {}", argument, name(tensor.dtype()));
  }
}

// `tensor` beside `model`, which was checked.
std::int64_t expect_like(std::string_view operation, std::string_view argument,
                         const Tensor& tensor, const Tensor& model,
                         std::string_view model_argument) {
  if (tensor.shape() != model.shape()) {
    fail(operation, "{} must have the shape {} of {}, got {}", argument, to_string(model.shape()),
         model_argument, to_string(tensor.shape()));
  }
  expect_device(operation, argument, tensor, model.device());
  return expect_rows(operation, argument, tensor);
}

// Matrices that are contiguous are one long row.
struct Layout {
  std::int64_t rows, width;
};
Layout layout(std::initializer_list<const Tensor*> tensors) {
  const Shape& shape = (*tensors.begin())->shape();
  for (const Tensor* tensor : tensors) {
    if (!tensor->is_contiguous()) {
      return {shape.rows(), shape.back()};
    }
  }
  return {1, shape.numel()};
}

}  // namespace

void accumulate(const Tensor& into, const Tensor& x) {
  expect_floating("accumulate", "into", into);
  expect_floating("accumulate", "x", x);
  const std::int64_t into_stride = expect_rows("accumulate", "into", into);
  const std::int64_t x_stride = expect_like("accumulate", "x", x, into, "into");
  if (into.is_meta() || into.numel() == 0) {
    return;
  }
  if (into.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("accumulate", cuda::accumulate(into, x));
  }
  const auto [rows, width] = layout({&into, &x});
  cpu::accumulate({into.raw(), into.dtype(), into_stride}, {x.raw(), x.dtype(), x_stride}, rows,
                  width);
}

void cast(const Tensor& x, const Tensor& y) {
  expect_floating("cast", "x", x);
  expect_floating("cast", "y", y);
  const std::int64_t x_stride = expect_rows("cast", "x", x);
  const std::int64_t y_stride = expect_like("cast", "y", y, x, "x");
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("cast", cuda::cast(x, y));
  }
  const auto [rows, width] = layout({&x, &y});
  cpu::cast({x.raw(), x.dtype(), x_stride}, {y.raw(), y.dtype(), y_stride}, rows, width);
}

void add(const Tensor& x, const Tensor& r, const Tensor& y) {
  expect_floating("add", "x", x);
  expect_dtype("add", "r", r, x.dtype());
  expect_dtype("add", "y", y, x.dtype());
  const std::int64_t x_stride = expect_rows("add", "x", x);
  const std::int64_t r_stride = expect_like("add", "r", r, x, "x");
  const std::int64_t y_stride = expect_like("add", "y", y, x, "x");
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE("add", cuda::add(x, r, y));
  }
  const auto [rows, width] = layout({&x, &r, &y});
  cpu::add({x.raw(), x.dtype(), x_stride}, {r.raw(), r.dtype(), r_stride},
           {y.raw(), y.dtype(), y_stride}, rows, width);
}

}  // namespace reprise::kernels
