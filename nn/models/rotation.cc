#include "nn/models/rotation.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda_device.h"
#include "core/error.h"
#include "nn/models/limits.h"

namespace reprise::nn {

namespace {

std::string wrong_position(const DeviceFault& fault) {
  return fmt::format("positions must be from 0 to {}, got {}", fault.limit - 1, fault.value);
}

// The largest position and one more, read on the host.
std::int64_t checked_length(const Tensor& positions) {
  std::int64_t length = 0;
  for (const std::int64_t position : positions.to_vector<std::int64_t>()) {
    if (position < 0 || position >= kMostPositions) {
      fail("model", "{}", wrong_position({.value = position, .limit = kMostPositions}));
    }
    length = std::max(length, position + 1);
  }
  return length;
}

// The same for positions on a cuda device, which checks them itself; 0 where the frequencies do not
// depend on it.
std::int64_t length_on_cuda(const RopeConfig& config, const Tensor& positions) {
  if (positions.rank() == 1) {
    return positions.size(0);
  }
  if (config.scaling == RopeScaling::dynamic) {
    return checked_length(positions);
  }
  check_indices({.at = positions.numel() == 0 ? nullptr : positions.data<std::int64_t>(),
                 .count = positions.numel(),
                 .limit = kMostPositions,
                 .site = fault_site("model", wrong_position)},
                positions.device());
  return 0;
}

Tensor on(const std::vector<float>& values, Device device) {
  const Shape shape{static_cast<std::int64_t>(values.size())};
  if (device.kind != DeviceKind::cuda || values.empty()) {
    return Tensor::from(values, shape, device);
  }
  const Tensor tensor = Tensor::empty(shape, DType::f32, device);
  cuda_write(tensor.raw(), device, values.data(), values.size() * sizeof(float));
  return tensor;
}

}  // namespace

Rotation rotation_of(const RopeConfig& config, const Tensor& positions, Device device,
                     RopeOptions options) {
  const std::int64_t length = positions.device().kind == DeviceKind::cuda
                                  ? length_on_cuda(config, positions)
                                  : checked_length(positions);
  options.attention_factor = config.attention_factor;
  return {positions, on(rope_frequencies(config, length), device), std::move(options)};
}

}  // namespace reprise::nn
