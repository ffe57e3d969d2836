#include "kernels/tokens.h"

#include "core/cuda_device.h"
#include "kernels/dispatch.h"
#include "kernels/tokens_sides.h"

namespace reprise::kernels {
namespace {

void expect_numbers(std::string_view operation, std::string_view argument, const Tensor& tensor,
                    Device device) {
  expect_dtype(operation, argument, tensor, DType::i64);
  expect_contiguous(operation, argument, tensor);
  expect_device(operation, argument, tensor, device);
}

}  // namespace

void next_labels(const Tensor& labels, const Tensor& ends, const Tensor& targets) {
  constexpr std::string_view op = "next_labels";
  const Device device = labels.device();
  expect_numbers(op, "labels", labels, device);
  if (labels.rank() != 2) {
    fail(op, "labels must be [B, T], got {}", to_string(labels.shape()));
  }
  expect_numbers(op, "targets", targets, device);
  expect_shape(op, "targets", targets, {labels.numel()}, "[B T]");
  if (ends.defined()) {
    expect_numbers(op, "ends", ends, device);
    if (ends.rank() != 1) {
      fail(op, "ends must be [N], got {}", to_string(ends.shape()));
    }
  }
  if (labels.numel() == 0) {
    return;
  }
  const bool any = ends.defined() && ends.numel() > 0;
  const NextLabels call{labels.data<std::int64_t>(),
                        labels.size(0),
                        labels.size(1),
                        any ? ends.data<std::int64_t>() : nullptr,
                        any ? ends.numel() : 0,
                        targets.data<std::int64_t>()};
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(op, cuda::next_labels(call, cuda_stream(device)));
    return;
  }
  cpu::next_labels(call);
}

void count_positions(const Tensor& positions) {
  constexpr std::string_view op = "count_positions";
  const Device device = positions.device();
  expect_numbers(op, "positions", positions, device);
  if (positions.rank() == 0) {
    fail(op, "positions must be [.., T], got a scalar");
  }
  if (positions.numel() == 0) {
    return;
  }
  const std::int64_t rows = positions.shape().rows(), tokens = positions.shape().back();
  auto* const at = positions.data<std::int64_t>();
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(op, cuda::count_positions(at, rows, tokens, cuda_stream(device)));
    return;
  }
  cpu::count_positions(at, rows, tokens);
}

}  // namespace reprise::kernels
