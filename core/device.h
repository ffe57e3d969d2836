// Where a tensor lives.
#pragma once

#include <cstdint>
#include <string>

namespace reprise {

// An account of memory (core/allocator.h): a device's own, or that of host memory for what leaves
// it for a while (host_of).
//
// meta: floating tensors have shapes and byte counts but no memory; integer tensors (ids,
// labels, masks) are real, in host memory, and counted on the meta device.
enum class DeviceKind : std::uint8_t { cpu, meta, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  std::int8_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr Device cpu{DeviceKind::cpu, 0};
inline constexpr Device meta{DeviceKind::meta, 0};

// Host memory for values that leave the device until they are needed again (core/host_copy.h), an
// account of its own: on cpu real memory, on meta counted only, of a cuda device page-locked.
constexpr Device host_of(Device device) {
  return device.kind == DeviceKind::cuda
             ? Device{DeviceKind::cpu, static_cast<std::int8_t>(device.index + 2)}
             : Device{device.kind, 1};
}

// What meta stands for on this thread: kernels there take the workspace that they would take on a
// device of this kind. cpu, unless a DryRunFor is alive.
namespace detail {
inline thread_local DeviceKind dry_run_kind = DeviceKind::cpu;
}
inline DeviceKind dry_run_kind() {
  return detail::dry_run_kind;
}
class DryRunFor {
 public:
  explicit DryRunFor(DeviceKind kind) : before_(detail::dry_run_kind) {
    detail::dry_run_kind = kind;
  }
  DryRunFor(const DryRunFor&) = delete;
  DryRunFor& operator=(const DryRunFor&) = delete;
  ~DryRunFor() { detail::dry_run_kind = before_; }

 private:
  DeviceKind before_;
};

// "cpu", "meta", "cuda:1", "host of cuda:1".
inline std::string to_string(Device device) {
  if (device.kind != DeviceKind::cuda && device.index > 0) {
    return device.index == 1 ? "host of " + to_string({device.kind, 0})
                             : "host of cuda:" + std::to_string(device.index - 2);
  }
  switch (device.kind) {
    case DeviceKind::cpu:
      return "cpu";
    case DeviceKind::meta:
      return "meta";
    case DeviceKind::cuda:
      return "cuda:" + std::to_string(device.index);
  }
  return "?";
}

}  // namespace reprise
