// Under which segment the allocators count. Internal to autograd.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "core/cuda_device.h"

namespace reprise {

// While it lives the allocators of cpu, meta and the cuda devices in use count under a label;
// afterwards each under the one that it had before. Those that live at one time end in the reverse
// order.
class SegmentLabel {
 public:
  explicit SegmentLabel(const std::string& label) {
    std::vector<Device> devices = cuda_devices_in_use();
    devices.insert(devices.end(), {cpu, meta});
    before_.reserve(devices.size());
    for (const Device device : devices) {
      before_.emplace_back(device, allocator(device).set_segment(label));
    }
  }
  ~SegmentLabel() {
    for (auto& [device, label] : before_) {
      allocator(device).set_segment(std::move(label));
    }
  }
  SegmentLabel(SegmentLabel&&) = default;
  SegmentLabel& operator=(SegmentLabel&&) = delete;

 private:
  std::vector<std::pair<Device, std::string>> before_;
};

}  // namespace reprise
