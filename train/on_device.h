// Where a command computes: the value of --device, and what is moved there.
#pragma once

#include <string_view>

#include <absl/status/status.h>
#include <absl/status/statusor.h>

#include "core/device.h"
#include "nn/models/model.h"

namespace reprise::train {

// "cpu", "cuda" (the first) or "cuda:1". InvalidArgument for another text.
absl::StatusOr<Device> parse_device(std::string_view text);
// FailedPrecondition when this build or this machine does not have it: what is missing.
absl::Status expect_usable(Device device);
// Returns when all work given to the device is done: before a clock is read.
void wait_for(Device device);
// The same elements of the same memory.
inline bool same_view(const Tensor& a, const Tensor& b) {
  return a.shares_storage(b) && a.offset() == b.offset() && a.shape() == b.shape() &&
         a.strides() == b.strides();
}
// Every tensor of the batch on the device; labels that are the ids still are.
nn::Batch on(const nn::Batch& batch, Device device);

}  // namespace reprise::train
