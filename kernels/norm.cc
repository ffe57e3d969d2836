#include "kernels/norm.h"

#include <string_view>

#include "core/cuda_device.h"
#include "kernels/dispatch.h"
#include "kernels/norm_sides.h"

namespace reprise::kernels {
namespace {

// Leading dimensions: one statistic a row.
Shape row_shape(const Tensor& x) {
  return Shape(x.shape().sizes().first(static_cast<std::size_t>(x.rank() - 1)));
}

// Checks the arguments of one call against its first, x (or dy where x is not read).
class Checks {
 public:
  Checks(std::string_view operation, std::string_view argument, const Tensor& x)
      : operation_(operation), x_(x) {
    if (x.dtype() != DType::f32 && x.dtype() != DType::bf16) {
      fail(operation, "{} must be f32 or bf16, got {}", argument, name(x.dtype()));
    }
    if (x.rank() == 0) {
      fail(operation, "{} must be [.., C], got a scalar", argument);
    }
    expect_rows(operation, argument, x);
  }

  std::int64_t rows() const { return x_.shape().rows(); }
  std::int64_t width() const { return x_.shape().back(); }

  void epsilon(double value) const {
    if (!(value >= 0)) {
      fail(operation_, "epsilon must not be negative, got {}", value);
    }
  }
  void like_x(std::string_view argument, const Tensor& tensor) const {
    same_place(argument, tensor, x_.dtype());
    expect_shape(operation_, argument, tensor, x_.shape(), "[.., C]");
    expect_rows(operation_, argument, tensor);
  }
  void per_column(std::string_view argument, const Tensor& tensor) const {
    same_place(argument, tensor, x_.dtype());
    column_layout(argument, tensor);
  }
  void column_gradient(std::string_view argument, const Tensor& tensor) const {
    same_place(argument, tensor, tensor.dtype() == DType::f32 ? DType::f32 : x_.dtype());
    column_layout(argument, tensor);
  }
  void per_row(std::string_view argument, const Tensor& tensor) const {
    same_place(argument, tensor, DType::f32);
    expect_shape(operation_, argument, tensor, row_shape(x_), "[..]");
    expect_contiguous(operation_, argument, tensor);
  }

 private:
  void same_place(std::string_view argument, const Tensor& tensor, DType dtype) const {
    expect_dtype(operation_, argument, tensor, dtype);
    expect_device(operation_, argument, tensor, x_.device());
  }
  void column_layout(std::string_view argument, const Tensor& tensor) const {
    expect_shape(operation_, argument, tensor, {width()}, "[C]");
    expect_contiguous(operation_, argument, tensor);
  }

  std::string_view operation_;
  const Tensor& x_;
};

NormRows rows_of(const Tensor& tensor) {
  return tensor.defined() ? NormRows{tensor.raw(), *tensor.row_stride()} : NormRows{};
}

template <class T>
T* pointer(const Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.raw()) : nullptr;
}

// Undefined tensors are absent: residual and sum together; bias; mean for rms_norm.
struct ForwardArguments {
  std::string_view operation;
  Norm norm;
  const Tensor &x, &residual, &weight, &bias;
  double epsilon;
  const Tensor &y, &sum, &mean, &scale;
};

void forward(const ForwardArguments& a) {
  const Checks check(a.operation, "x", a.x);
  check.epsilon(a.epsilon);
  if (a.residual.defined()) {
    check.like_x("residual", a.residual);
    check.like_x("sum", a.sum);
  }
  check.per_column("weight", a.weight);
  if (a.bias.defined()) {
    check.per_column("bias", a.bias);
  }
  check.like_x("y", a.y);
  if (a.mean.defined()) {
    check.per_row("mean", a.mean);
  }
  check.per_row("scale", a.scale);
  if (a.x.is_meta() || check.rows() == 0) {
    return;
  }
  const NormForward call{.norm = a.norm,
                         .dtype = a.x.dtype(),
                         .rows = check.rows(),
                         .width = check.width(),
                         .epsilon = static_cast<float>(a.epsilon),
                         .x = rows_of(a.x),
                         .residual = rows_of(a.residual),
                         .sum = rows_of(a.sum),
                         .y = rows_of(a.y),
                         .weight = pointer<void>(a.weight),
                         .bias = pointer<void>(a.bias),
                         .mean = pointer<float>(a.mean),
                         .scale = pointer<float>(a.scale)};
  if (a.x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(a.operation, cuda::norm_forward(call, cuda_stream(a.x.device())));
  } else {
    cpu::norm_forward(call);
  }
}

// A gradient that is summed over rows, with the workspace for the chunks' sums.
class ColumnGradient {
 public:
  ColumnGradient(const NormGradient& gradient, std::int64_t rows, std::int64_t width)
      : gradient_(gradient) {
    if (gradient.tensor.defined()) {
      partial_ = Tensor::empty({norm_chunks(rows), width}, DType::f32, gradient.tensor.device(),
                               MemoryKind::workspace);
    }
  }
  NormSum sum() const {
    const auto& [tensor, accumulate] = gradient_;
    return tensor.defined()
               ? NormSum{tensor.raw(), tensor.dtype(), accumulate, partial_.data<float>()}
               : NormSum{};
  }

 private:
  const NormGradient& gradient_;
  Tensor partial_;
};

// Undefined tensors are absent: dsum; mean for rms_norm; x and weight where they are not read.
struct BackwardArguments {
  std::string_view operation;
  Norm norm;
  const Tensor &dy, &dsum, &x, &weight, &mean, &scale;
  const NormGradients& out;
};

bool reads_x(const NormGradients& out) {
  return out.dx.tensor.defined() || out.dweight.tensor.defined();
}

void check_backward(const Checks& check, const BackwardArguments& a) {
  if (a.out.dx.tensor.defined()) {
    check.like_x("dx", a.out.dx.tensor);
    check.per_column("weight", a.weight);
    if (a.dsum.defined()) {
      check.like_x("dsum", a.dsum);
    }
  }
  if (reads_x(a.out)) {
    check.like_x("x", a.x);
    check.per_row("scale", a.scale);
    if (a.norm == Norm::layer) {
      check.per_row("mean", a.mean);
    }
  }
  if (a.out.dweight.tensor.defined()) {
    check.column_gradient("dweight", a.out.dweight.tensor);
  }
  if (a.out.dbias.tensor.defined()) {
    check.column_gradient("dbias", a.out.dbias.tensor);
  }
}

void backward(const BackwardArguments& a) {
  const Checks check(a.operation, "dy", a.dy);
  check_backward(check, a);
  const ColumnGradient dweight(a.out.dweight, check.rows(), check.width());
  const ColumnGradient dbias(a.out.dbias, check.rows(), check.width());
  if (a.dy.is_meta()) {
    return;
  }
  NormBackward call;
  call.norm = a.norm;
  call.dtype = a.dy.dtype();
  call.rows = check.rows();
  call.width = check.width();
  call.dy = rows_of(a.dy);
  call.dx = rows_of(a.out.dx.tensor);
  call.accumulate_x = a.out.dx.accumulate;
  call.dweight = dweight.sum();
  call.dbias = dbias.sum();
  if (a.out.dx.tensor.defined()) {
    call.dsum = rows_of(a.dsum);
    call.weight = a.weight.raw();
  }
  if (reads_x(a.out)) {
    call.x = rows_of(a.x);
    call.mean = pointer<float>(a.mean);
    call.scale = pointer<float>(a.scale);
  }
  if (a.dy.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(a.operation, cuda::norm_backward(call, cuda_stream(a.dy.device())));
  } else {
    cpu::norm_backward(call);
  }
}

}  // namespace

void rms_norm(const Tensor& x, const Tensor& weight, double epsilon, const Tensor& y,
              const Tensor& scale) {
  forward({"rms_norm", Norm::rms, x, {}, weight, {}, epsilon, y, {}, {}, scale});
}

void rms_norm_residual(const Tensor& x, const Tensor& residual, const Tensor& weight,
                       double epsilon, const Tensor& y, const Tensor& sum, const Tensor& scale) {
  forward({"rms_norm_residual", Norm::rms, x, residual, weight, {}, epsilon, y, sum, {}, scale});
}

void layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon,
                const Tensor& y, const Tensor& mean, const Tensor& scale) {
  forward({"layer_norm", Norm::layer, x, {}, weight, bias, epsilon, y, {}, mean, scale});
}

void layer_norm_residual(const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const Tensor& bias, double epsilon, const Tensor& y, const Tensor& sum,
                         const Tensor& mean, const Tensor& scale) {
  forward({"layer_norm_residual", Norm::layer, x, residual, weight, bias, epsilon, y, sum, mean,
           scale});
}

void rms_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight,
                       const Tensor& scale, const NormGradients& gradients) {
  backward({"rms_norm_backward", Norm::rms, dy, dsum, x, weight, {}, scale, gradients});
}

void layer_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& x,
                         const Tensor& weight, const Tensor& mean, const Tensor& scale,
                         const NormGradients& gradients) {
  backward({"layer_norm_backward", Norm::layer, dy, dsum, x, weight, mean, scale, gradients});
}

}  // namespace reprise::kernels
