#include "train/on_device.h"

#include <charconv>

#include <fmt/format.h>

#include "core/allocator.h"
#include "core/cuda_device.h"
#include "core/error.h"
#include "nn/models/attend.h"

namespace reprise::train {

absl::StatusOr<Device> parse_device(std::string_view text) {
  if (text == "cpu") {
    return cpu;
  }
  constexpr std::string_view kCuda = "cuda";
  if (text == kCuda) {
    return Device{DeviceKind::cuda, 0};
  }
  if (text.starts_with("cuda:")) {
    const std::string_view number = text.substr(kCuda.size() + 1);
    int index = -1;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), index);
    if (error == std::errc() && end == number.data() + number.size() && index >= 0 && index < 128) {
      return Device{DeviceKind::cuda, static_cast<std::int8_t>(index)};
    }
  }
  return absl::InvalidArgumentError(
      fmt::format("must be cpu, cuda or cuda:N, got \"{}\"", text.substr(0, 40)));
}

absl::Status expect_usable(Device device) {
  try {
    (void)allocator(device);
  } catch (const Error& missing) {
    return absl::FailedPreconditionError(missing.what());
  }
  return absl::OkStatus();
}

void wait_for(Device device) {
  if (device.kind == DeviceKind::cuda) {
    cuda_synchronize(device);
  }
}

nn::Batch on(const nn::Batch& batch, Device device) {
  nn::Batch moved = batch;
  for (Tensor nn::Batch::*part :
       {&nn::Batch::ids, &nn::Batch::labels, &nn::Batch::mask, &nn::Batch::positions,
        &nn::Batch::pixels, &nn::Batch::grids, &nn::Batch::image_tokens}) {
    if ((batch.*part).defined()) {
      moved.*part = (batch.*part).to(device);
    }
  }
  if (batch.labels.defined() && same_view(batch.labels, batch.ids)) {
    moved.labels = moved.ids;  // counted once, as there
  }
  if (batch.mask.defined() && !batch.padded_right && batch.mask.device().kind != DeviceKind::cuda) {
    moved.padded_right = nn::is_padded_right(batch.mask);  // while it is here to be looked at
  }
  return moved;
}

}  // namespace reprise::train
