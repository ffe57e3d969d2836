// The cuda device by the CUDA runtime. Memory is ordered by the one stream that this process uses
// on a device, so a block that is freed can be handed out again at once.
#include "core/cuda_device.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>

#include <cuda_runtime_api.h>

#include "core/cuda_errors.h"
#include "core/error.h"

namespace reprise {
namespace {

constexpr int kMostDevices = 16;

struct Found {
  int devices = 0;
  cudaError_t status = cudaSuccess;
};
// Asked once: a driver does not come and go.
const Found& found() {
  static const Found once = [] {
    Found it;
    it.status = cudaGetDeviceCount(&it.devices);
    it.devices = it.status == cudaSuccess ? std::min(it.devices, kMostDevices) : 0;
    return it;
  }();
  return once;
}

void expect_kernels_for(Device device) {
  cudaDeviceProp card{};
  cuda_check("cuda", cudaGetDeviceProperties(&card, device.index));
  expect_capability(to_string(device), card.name, card.major, card.minor);
}

// Makes the device current on this thread while it lives.
class Current {
 public:
  explicit Current(Device device) {
    if (device.kind != DeviceKind::cuda || device.index < 0 ||
        device.index >= cuda_device_count()) {
      cuda_check("cuda", found().status);  // no driver, no device
      fail("cuda", "device must be one of {} (cuda:0 ..), got {}", cuda_device_count(),
           to_string(device));
    }
    cuda_check("cuda", cudaGetDevice(&before_));
    if (before_ != device.index) {
      cuda_check("cuda", cudaSetDevice(device.index));
    }
    changed_ = before_ != device.index;
  }
  ~Current() {
    if (changed_) {
      cudaSetDevice(before_);
    }
  }
  Current(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Made at its first use and never destroyed: the driver may be gone before static objects are.
cudaStream_t stream_of(Device device) {
  static std::mutex mutex;
  static std::array<cudaStream_t, kMostDevices> streams{};
  const Current current(device);
  const std::lock_guard lock(mutex);
  cudaStream_t& stream = streams.at(static_cast<std::size_t>(device.index));
  if (stream == nullptr) {
    cuda_check("cuda", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  return stream;
}

struct Allocators {
  std::mutex mutex;
  std::array<std::unique_ptr<Allocator>, kMostDevices> made;
};
Allocators& allocators() {
  static Allocators all;
  return all;
}

// The runtime's pool, told to keep what it has.
class CudaMemory final : public MemorySource {
 public:
  explicit CudaMemory(Device device) : device_(device) {
    const Current current(device);
    cudaMemPool_t pool = nullptr;
    cuda_check("cuda", cudaDeviceGetDefaultMemPool(&pool, device.index));
    std::uint64_t keep_bytes = UINT64_MAX;
    cuda_check("cuda", cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_bytes));
  }
  void* allocate(std::size_t bytes) override {
    const Current current(device_);
    void* at = nullptr;
    const cudaError_t status = cudaMallocAsync(&at, bytes, stream_of(device_));
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      std::size_t free_bytes = 0, total_bytes = 0;
      cudaMemGetInfo(&free_bytes, &total_bytes);
      fail("cuda", "no memory for {} bytes on {}: {} of {} are free", bytes, to_string(device_),
           free_bytes, total_bytes);
    }
    cuda_check("cuda", status);
    return at;
  }
  void free(void* at, std::size_t) noexcept override {
    // Nothing to do about a failure: the device is lost, and the next call says so.
    cudaFreeAsync(at, stream_of(device_));
  }

 private:
  const Device device_;
};

}  // namespace

void cuda_check(const char* operation, int status) {
  if (status != cudaSuccess) {
    const auto error = static_cast<cudaError_t>(status);
    const std::string advice = cuda_advice(status);
    fail(operation, "CUDA: {} ({}){}{}", cudaGetErrorString(error), cudaGetErrorName(error),
         advice.empty() ? "" : ": ", advice);
  }
}

int cuda_device_count() {
  return found().devices;
}

Allocator& cuda_allocator(Device device) {
  const Current current(device);
  const std::lock_guard lock(allocators().mutex);
  auto& made = allocators().made.at(static_cast<std::size_t>(device.index));
  if (made == nullptr) {
    expect_kernels_for(device);
    made = std::make_unique<Allocator>(device, std::make_unique<CudaMemory>(device));
  }
  return *made;
}

std::vector<Device> cuda_devices_in_use() {
  const std::lock_guard lock(allocators().mutex);
  std::vector<Device> devices;
  for (int i = 0; i < kMostDevices; ++i) {
    if (allocators().made.at(static_cast<std::size_t>(i)) != nullptr) {
      devices.push_back({DeviceKind::cuda, static_cast<std::int8_t>(i)});
    }
  }
  return devices;
}

void cuda_copy(void* to, Device to_device, const void* from, Device from_device,
               std::size_t bytes) {
  const bool to_cuda = to_device.kind == DeviceKind::cuda;
  const bool from_cuda = from_device.kind == DeviceKind::cuda;
  const Device on = to_cuda ? to_device : from_device;
  const Current current(on);
  const cudaStream_t stream = stream_of(on);
  if (to_cuda && from_cuda && !(to_device == from_device)) {
    // What the other device's stream has yet to write must be there.
    cuda_synchronize(from_device);
  }
  cuda_check("cuda_copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  if (!(to_cuda && from_cuda && to_device == from_device)) {
    cuda_check("cuda_copy", cudaStreamSynchronize(stream));
  }
}

void cuda_zero(void* at, Device device, std::size_t bytes) {
  const Current current(device);
  cuda_check("cuda_zero", cudaMemsetAsync(at, 0, bytes, stream_of(device)));
}

void cuda_synchronize(Device device) {
  const Current current(device);
  cuda_check("cuda_synchronize", cudaStreamSynchronize(stream_of(device)));
}

void* cuda_stream(Device device) {
  const cudaStream_t stream = stream_of(device);
  cuda_check("cuda", cudaSetDevice(device.index));
  return stream;
}

}  // namespace reprise
