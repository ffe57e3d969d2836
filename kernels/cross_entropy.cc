#include "kernels/cross_entropy.h"

#include <cmath>
#include <string>
#include <string_view>

#include "core/cuda_device.h"
#include "kernels/cross_entropy_sides.h"
#include "kernels/dispatch.h"

namespace reprise::kernels {
namespace {

Shape leading(std::string_view operation, const Tensor& x) {
  if (x.dtype() != DType::f32 && x.dtype() != DType::bf16) {
    fail(operation, "x must be f32 or bf16, got {}", name(x.dtype()));
  }
  if (x.rank() == 0) {
    fail(operation, "x must be [.., V], got a scalar");
  }
  return Shape(x.shape().sizes().first(static_cast<std::size_t>(x.rank() - 1)));
}

// Returns the row stride of x.
std::int64_t check(std::string_view operation, const Tensor& x, const Tensor& labels,
                   const Tensor& lse) {
  const Shape rows = leading(operation, x);
  expect_dtype(operation, "labels", labels, DType::i64);
  expect_shape(operation, "labels", labels, rows, "the leading sizes of x");
  expect_device(operation, "labels", labels, x.device());
  expect_contiguous(operation, "labels", labels);
  expect_dtype(operation, "lse", lse, DType::f32);
  expect_shape(operation, "lse", lse, rows, "the leading sizes of x");
  expect_device(operation, "lse", lse, x.device());
  expect_contiguous(operation, "lse", lse);
  return expect_rows(operation, "x", x);
}

void expect_scalar(std::string_view operation, std::string_view argument, const Tensor& tensor,
                   Device device) {
  expect_dtype(operation, argument, tensor, DType::f32);
  expect_shape(operation, argument, tensor, Shape{}, "[]");
  expect_device(operation, argument, tensor, device);
}

LogitRows rows_of(const Tensor& x, std::int64_t stride, const Tensor& labels,
                  std::int64_t ignore_index) {
  return {x.numel() == 0 ? nullptr : x.raw(),
          x.dtype(),
          x.shape().rows(),
          x.shape().back(),
          stride,
          labels.numel() == 0 ? nullptr : labels.data<std::int64_t>(),
          ignore_index};
}

}  // namespace

namespace {

std::string wrong_label(const DeviceFault& fault) {
  return fmt::format("label of row {} must be {} or in [0, V) = [0, {}), got {}", fault.index,
                     fault.other, fault.limit, fault.value);
}

// The number of labels that are not ignored.
std::int64_t checked_count(const char* operation, const Tensor& labels, std::int64_t vocabulary,
                           std::int64_t ignore_index) {
  std::int64_t valid = 0;
  const std::int64_t* at = labels.numel() == 0 ? nullptr : labels.data<std::int64_t>();
  for (std::int64_t n = 0; n < labels.numel(); ++n) {
    if (at[n] == ignore_index) {
      continue;
    }
    if (at[n] < 0 || at[n] >= vocabulary) {
      fail(operation, "{}",
           wrong_label({.index = n, .value = at[n], .limit = vocabulary, .other = ignore_index}));
    }
    ++valid;
  }
  return valid;
}

}  // namespace

Tensor count_of_items(Device device, const CrossEntropyOptions& options) {
  const bool counts = side_of(device) == DeviceKind::cuda && !(options.items > 0);
  return counts ? Tensor::empty(Shape{}, DType::i64, device, MemoryKind::workspace) : Tensor();
}

LossItems checked_items(const char* operation, const Tensor& labels, std::int64_t vocabulary,
                        const CrossEntropyOptions& options, const Tensor& count) {
  if (!(options.items >= 0) || std::isinf(options.items)) {
    fail(operation, "items must be 0 or a positive number, got {}", options.items);
  }
  if (labels.device().kind == DeviceKind::cuda) {
    const LossItems items{options.items, count.defined() ? count.data<std::int64_t>() : nullptr};
    check_indices({.at = labels.numel() == 0 ? nullptr : labels.data<std::int64_t>(),
                   .count = labels.numel(),
                   .limit = vocabulary,
                   .site = fault_site(operation, wrong_label),
                   .ignores = true,
                   .ignored = options.ignore_index,
                   .valid = const_cast<std::int64_t*>(items.counted)},
                  labels.device());
    return items;
  }
  const std::int64_t valid = checked_count(operation, labels, vocabulary, options.ignore_index);
  return {options.items > 0 ? options.items : static_cast<double>(valid)};
}

#if defined(REPRISE_HAS_CUDA)
static void cuda_cross_entropy(const LogitRows& rows, float* lse, float* losses, const Tensor& loss,
                               const LossItems& items) {
  void* const stream = cuda_stream(loss.device());
  cuda::cross_entropy_rows(rows, lse, losses, stream);
  cuda::mean_of_losses(losses, rows.rows, items, loss.data<float>(), stream);
}
#endif

void cross_entropy(const Tensor& x, const Tensor& labels, const Tensor& loss, const Tensor& lse,
                   const CrossEntropyOptions& options) {
  constexpr const char* op = "cross_entropy";
  const std::int64_t stride = check(op, x, labels, lse);
  expect_scalar(op, "loss", loss, x.device());
  const Tensor losses =
      Tensor::empty(labels.shape(), DType::f32, x.device(), MemoryKind::workspace);
  const Tensor count = count_of_items(x.device(), options);
  const LossItems items = checked_items(op, labels, x.shape().back(), options, count);
  if (x.is_meta()) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    [[maybe_unused]] const bool any = labels.numel() > 0;
    REPRISE_CUDA_SIDE(op, cuda_cross_entropy(rows_of(x, stride, labels, options.ignore_index),
                                             any ? lse.data<float>() : nullptr,
                                             any ? losses.data<float>() : nullptr, loss, items));
    return;
  }
  double total = 0;
  if (labels.numel() > 0) {
    float* at = losses.data<float>();
    cpu::cross_entropy_rows(rows_of(x, stride, labels, options.ignore_index), lse.data<float>(),
                            at);
    for (std::int64_t n = 0; n < labels.numel(); ++n) {
      total += at[n];
    }
  }
  *loss.data<float>() = static_cast<float>(total / items.number);
}

void cross_entropy_backward(const Tensor& g, const Tensor& x, const Tensor& labels,
                            const Tensor& lse, const Tensor& dx, const CrossEntropyOptions& options,
                            bool accumulate) {
  constexpr const char* op = "cross_entropy_backward";
  const std::int64_t stride = check(op, x, labels, lse);
  expect_scalar(op, "g", g, x.device());
  expect_dtype(op, "dx", dx, x.dtype());
  expect_shape(op, "dx", dx, x.shape(), "the shape of x");
  expect_device(op, "dx", dx, x.device());
  const std::int64_t dx_stride = expect_rows(op, "dx", dx);
  const Tensor count = count_of_items(x.device(), options);
  const LossItems items = checked_items(op, labels, x.shape().back(), options, count);
  if (x.is_meta() || x.numel() == 0) {
    return;
  }
  if (x.device().kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(
        op, cuda::cross_entropy_gradient(rows_of(x, stride, labels, options.ignore_index),
                                         lse.data<float>(), g.data<float>(), items, dx.raw(),
                                         dx_stride, accumulate, cuda_stream(x.device())));
    return;
  }
  cpu::cross_entropy_gradient(rows_of(x, stride, labels, options.ignore_index), lse.data<float>(),
                              static_cast<float>(g.item<float>() / items.number), dx.raw(),
                              dx_stride, accumulate);
}

}  // namespace reprise::kernels
