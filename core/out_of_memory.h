// A device that has no more memory.
#pragma once

#include <cstdint>
#include <string>

#include "core/device.h"
#include "core/error.h"

namespace reprise {

// The text says what was wanted, and who holds what, by kind and segment; a trainer adds which
// policies fit (train/what_fits.h).
class OutOfMemory : public Error {
 public:
  // `available_bytes`: what is free, and, once an allocator has thrown it, what its tensors hold.
  OutOfMemory(const std::string& text, Device device, std::int64_t available_bytes)
      : Error(text), device_(device), available_bytes_(available_bytes) {}
  Device device() const { return device_; }
  std::int64_t available_bytes() const { return available_bytes_; }

 private:
  Device device_;
  std::int64_t available_bytes_;
};

}  // namespace reprise
