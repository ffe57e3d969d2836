// Where a tensor lives.
#pragma once

#include <cstdint>
#include <string>

namespace reprise {

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

// "cpu", "meta", "cuda:1".
inline std::string to_string(Device device) {
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
