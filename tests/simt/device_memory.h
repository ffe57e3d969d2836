// Memory of the shim's device: host memory that only kernels, copies and the stand-ins of libraries
// may touch. Host code that reads or writes an element of a device tensor ends the program, as it
// would on a machine with a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace reprise::testing {

class DeviceMemory {
 public:
  static DeviceMemory& instance();

  // Aligned to 256 bytes, with space of nobody's around it.
  void* allocate(std::size_t bytes);
  void free(void* at) noexcept;
  bool holds(const void* at) const;
  // What the device has: 64 GiB, or as many bytes as REPRISE_SHIM_BYTES says.
  std::int64_t total_bytes = std::int64_t{64} << 30;
  // What the next wait for a library's call finds (a cudaError_t).
  int next_status = 0;

  // While one lives, the memory may be touched.
  class Access {
   public:
    Access();
    ~Access();
    Access(const Access&) = delete;
  };

 private:
  DeviceMemory();
  void protect(int protection);

  std::mutex mutex_;
  char* base_ = nullptr;
  std::size_t used_ = 0;                // from the base to the end of the last block there was
  std::map<char*, std::size_t> free_;   // bytes by address, neighbours joined
  std::map<char*, std::size_t> taken_;  // bytes by address
  int accesses_ = 0;
};

}  // namespace reprise::testing
