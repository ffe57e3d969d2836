// The cuda device by the CUDA runtime. Memory is ordered by the device's compute stream, so a block
// that is freed can be handed out again at once (core/streams.h says what others have to do).
#include "core/cuda_device.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include <cuda_runtime_api.h>

#include "core/cuda_errors.h"
#include "core/error.h"
#include "core/out_of_memory.h"
#include "core/pinned_memory.h"
#include "core/step_graph.h"

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

// The runtime, for one device.
class RuntimeCalls final : public CudaCalls {
 public:
  explicit RuntimeCalls(Device device) : device_(device) {}
  void use_device() override { cuda_check("cuda", cudaSetDevice(device_.index)); }
  Stream make_stream() override {
    cudaStream_t stream = nullptr;
    cuda_check("cuda", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  void destroy_stream(Stream stream) noexcept override {
    cudaStreamDestroy(static_cast<cudaStream_t>(stream));
  }
  Event make_event() override {
    cudaEvent_t event = nullptr;
    cuda_check("cuda", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  void destroy_event(Event event) noexcept override {
    cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
  void record(Event event, Stream stream) override {
    cuda_check("cuda",
               cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
  }
  void wait(Stream stream, Event event) override {
    cuda_check("cuda", cudaStreamWaitEvent(static_cast<cudaStream_t>(stream),
                                           static_cast<cudaEvent_t>(event), 0));
  }
  void synchronize(Stream stream) override {
    expect_not_capturing("cuda_synchronize", "the host waits for the device");
    cuda_check("cuda_synchronize", cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
  }
  void* allocate(std::size_t bytes) override {
    void* at = nullptr;
    return or_null(cudaMalloc(&at, bytes), at);
  }
  void free(void* at) noexcept override { cudaFree(at); }
  void* allocate_pinned(std::size_t bytes) override {
    expect_not_capturing("allocate", "page-locked memory that no earlier step has left");
    void* at = nullptr;
    return or_null(cudaHostAlloc(&at, bytes, cudaHostAllocDefault), at);
  }
  void free_pinned(void* at) noexcept override { cudaFreeHost(at); }
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override {
    cuda_check("cuda_copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault,
                                            static_cast<cudaStream_t>(stream)));
  }
  void begin_capture(Stream stream) override {
    cuda_check("capture", cudaStreamBeginCapture(static_cast<cudaStream_t>(stream),
                                                 cudaStreamCaptureModeThreadLocal));
  }
  Graph end_capture(Stream stream) override {
    cudaGraph_t captured = nullptr;
    cuda_check("capture", cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &captured));
    cudaGraphExec_t graph = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&graph, captured, 0);
    cudaGraphDestroy(captured);
    cuda_check("capture", status);
    return graph;
  }
  void launch(Graph graph, Stream stream) override {
    cuda_check("launch", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph),
                                         static_cast<cudaStream_t>(stream)));
  }
  void destroy_graph(Graph graph) noexcept override {
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
  }

 private:
  static void* or_null(cudaError_t status, void* at) {
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    cuda_check("cuda", status);
    return at;
  }

  const Device device_;
};

std::shared_ptr<CudaCalls> calls_of(Device device) {
  return std::make_shared<RuntimeCalls>(device);
}

cudaStream_t stream_of(Device device) {
  return static_cast<cudaStream_t>(cuda_streams(device).stream(StreamKind::compute));
}

struct Allocators {
  std::mutex mutex;
  std::array<std::unique_ptr<Allocator>, kMostDevices> made, host;
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
      throw_out_of_memory(bytes);
    }
    cuda_check("cuda", status);
    return at;
  }
  void free(void* at, std::size_t) noexcept override {
    // Nothing to do about a failure: the device is lost, and the next call says so.
    cudaFreeAsync(at, stream_of(device_));
  }

 private:
  [[noreturn]] void throw_out_of_memory(std::size_t wanted_bytes) const {
    std::size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    cudaMemPool_t pool = nullptr;
    std::uint64_t reserved_bytes = 0, used_bytes = 0;  // of the pool: the rest of it is free, too
    if (cudaDeviceGetDefaultMemPool(&pool, device_.index) == cudaSuccess) {
      cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &reserved_bytes);
      cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &used_bytes);
    }
    throw OutOfMemory(fmt::format("[cuda] no memory for {} bytes on {}: {} of {} are free",
                                  wanted_bytes, to_string(device_), free_bytes, total_bytes),
                      device_, static_cast<std::int64_t>(free_bytes + reserved_bytes - used_bytes));
  }

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

// Made at its first use and never destroyed: the driver may be gone before static objects are.
Streams& cuda_streams(Device device) {
  static std::mutex mutex;
  static std::array<Streams*, kMostDevices> made{};
  const Current current(device);
  const std::lock_guard lock(mutex);
  Streams*& streams = made.at(static_cast<std::size_t>(device.index));
  if (streams == nullptr) {
    streams = new Streams(calls_of(device));
  }
  return *streams;
}

namespace {

// The account of host memory of the device that `host` is of (host_of).
Allocator& pinned_allocator(Device host) {
  const Device device{DeviceKind::cuda, static_cast<std::int8_t>(host.index - 2)};
  const Current current(device);
  const std::lock_guard lock(allocators().mutex);
  auto& made = allocators().host.at(static_cast<std::size_t>(device.index));
  if (made == nullptr) {
    made = std::make_unique<Allocator>(host, std::make_unique<PinnedMemory>(calls_of(device)));
  }
  return *made;
}

}  // namespace

Allocator& cuda_allocator(Device device) {
  if (device.kind == DeviceKind::cpu) {
    return pinned_allocator(device);
  }
  const Current current(device);
  const std::lock_guard lock(allocators().mutex);
  auto& made = allocators().made.at(static_cast<std::size_t>(device.index));
  if (made == nullptr) {
    expect_kernels_for(device);
    (void)cuda_fault_word(device);  // now: no capture could
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
  if (!to_cuda || !from_cuda) {
    expect_not_capturing("cuda_copy", "the host reads or writes elements");
  }
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
  if (!to_cuda) {
    throw_fault(*cuda_fault_word(from_device));
  }
}

void cuda_zero(void* at, Device device, std::size_t bytes) {
  const Current current(device);
  cuda_check("cuda_zero", cudaMemsetAsync(at, 0, bytes, stream_of(device)));
}

void cuda_synchronize(Device device) {
  expect_not_capturing("cuda_synchronize", "the host waits for the device");
  const Current current(device);
  cuda_check("cuda_synchronize", cudaStreamSynchronize(stream_of(device)));
  throw_fault(*cuda_fault_word(device));
}

// Never freed: a captured step may write it.
DeviceFault* cuda_fault_word(Device device) {
  static std::mutex mutex;
  static std::array<DeviceFault*, kMostDevices> made{};
  const Current current(device);
  const std::lock_guard lock(mutex);
  DeviceFault*& word = made.at(static_cast<std::size_t>(device.index));
  if (word == nullptr) {
    void* at = nullptr;
    cuda_check("cuda", cudaHostAlloc(&at, sizeof(DeviceFault), cudaHostAllocMapped));
    word = new (at) DeviceFault;
  }
  return word;
}

CudaBytes cuda_bytes(Device device) {
  const Current current(device);
  std::size_t free_bytes = 0, total_bytes = 0;
  cuda_check("cuda", cudaMemGetInfo(&free_bytes, &total_bytes));
  return {static_cast<std::int64_t>(free_bytes), static_cast<std::int64_t>(total_bytes)};
}

int cuda_wait(void* stream) {
  return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}

void* cuda_stream(Device device) {
  const cudaStream_t stream = stream_of(device);
  cuda_check("cuda", cudaSetDevice(device.index));
  return stream;
}

}  // namespace reprise
