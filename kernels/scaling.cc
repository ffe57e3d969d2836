#include "kernels/scaling.h"

#include <string_view>

#include "core/cuda_device.h"
#include "kernels/column_sums_workspace.h"
#include "kernels/matrix.h"
#include "kernels/scaling_sides.h"

namespace reprise::kernels {
namespace {

std::string_view operation_of(Factors factors) {
  switch (factors) {
    case Factors::columns:
      return "scale_columns";
    case Factors::rows:
      return "scale_rows";
    case Factors::all:
      return "scale";
  }
  return "?";
}

MatrixSize size_of(const Tensor& x) {
  return x.rank() == 0 ? MatrixSize{1, 1} : MatrixSize{x.shape().rows(), x.shape().back()};
}

// v or dv.
Matrix factors_of(Factors factors, std::string_view argument, const Tensor& v, const Tensor& x) {
  const std::string_view operation = operation_of(factors);
  expect_trainable(operation, argument, v);
  if (factors == Factors::all) {
    expect_shape(operation, argument, v, Shape{}, "[]");
  } else {
    if (x.rank() == 0) {
      fail(operation, "x must be [.., C], got a scalar");
    }
    const Shape& shape = x.shape();
    const Shape leading(shape.sizes().first(static_cast<std::size_t>(x.rank() - 1)));
    if (factors == Factors::columns) {
      expect_shape(operation, argument, v, {shape.back()}, "[C]");
    } else if (v.shape() != leading) {
      expect_shape(operation, argument, v, {shape.rows()}, "[rows]");
    }
  }
  expect_device(operation, argument, v, x.device());
  expect_contiguous(operation, argument, v);
  const bool elements = !v.is_meta() && v.numel() > 0;
  return {elements ? v.raw() : nullptr, v.dtype(), 0};
}

}  // namespace

void scale_by(Factors factors, const Tensor& x, const Tensor& v, const Tensor& y, bool accumulate) {
  const std::string_view operation = operation_of(factors);
  expect_trainable(operation, "x", x);
  const Matrix by = factors_of(factors, "v", v, x);
  expect_trainable(operation, "y", y);
  expect_like(operation, "y", y, x, "x");
  const Matrix from = matrix(operation, "x", x), to = matrix(operation, "y", y);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  const FactorSteps steps{factors == Factors::rows, factors == Factors::columns};
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(operation, cuda::scale_by(from, by, steps, to, accumulate, size_of(x),
                                                cuda_stream(x.device())));
    return;
  }
  cpu::scale_by(from, by, steps, to, accumulate, size_of(x));
}

void scale_by_gradient(Factors factors, const Tensor& x, const Tensor& dy, const Tensor& dv,
                       bool accumulate) {
  const std::string_view operation = operation_of(factors);
  expect_trainable(operation, "x", x);
  expect_dtype(operation, "dy", dy, x.dtype());
  expect_like(operation, "dy", dy, x, "x");
  const Matrix to = factors_of(factors, "dv", dv, x);
  const Matrix from = matrix(operation, "x", x), gradient = matrix(operation, "dy", dy);
  const MatrixSize size = size_of(x);
  const Tensor partial = factors == Factors::columns
                             ? column_sum_workspace(size, x.device())
                             : Tensor::empty({size.rows, dot_pieces(size.width)}, DType::f32,
                                             x.device(), MemoryKind::workspace);
  if (x.is_meta() || dv.numel() == 0) {
    return;
  }
  const bool pieces = partial.numel() > 0;
  const DotCall call{.x = from,
                     .dy = gradient,
                     .dv = to,
                     .size = size,
                     .accumulate = accumulate,
                     .partial = pieces ? partial.data<float>() : nullptr};
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(operation, [&](void* stream) {
      factors == Factors::columns ? cuda::column_dots(call, stream)
      : factors == Factors::rows  ? cuda::row_dots(call, stream)
                                  : cuda::dot(call, stream);
    }(cuda_stream(x.device())));
    return;
  }
  factors == Factors::columns ? cpu::column_dots(call)
  : factors == Factors::rows  ? cpu::row_dots(call)
                              : cpu::dot(call);
}

}  // namespace reprise::kernels
