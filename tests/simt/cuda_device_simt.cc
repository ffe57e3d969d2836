// The cuda device of the tests that run kernels on the SIMT shim: one device, whose memory is the
// host's, with every tensor's bounds known to the shim and closed to host code; launches and copies
// are done when they return.
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "core/arena.h"
#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#include "core/error.h"
#include "core/out_of_memory.h"
#include "core/step_graph.h"
#include "tests/core/cuda_stand_in.h"
#include "tests/op_case.h"
#include "tests/simt/capture_simt.h"
#include "tests/simt/device_memory.h"
#include "tests/simt/simt.h"

namespace reprise {
namespace {

void expect_present(Device device) {
  if (device.kind != DeviceKind::cuda || device.index != 0) {
    fail("cuda", "device must be cuda:0, got {}", to_string(device));
  }
}

using testing::DeviceMemory;

std::int64_t held_bytes = 0;  // of the device

class ShimMemory final : public MemorySource {
 public:
  ShimMemory() {
    simt::options().gate = [](bool open) {
      static std::optional<DeviceMemory::Access> access;  // one launch at a time
      open ? void(access.emplace()) : access.reset();
    };
  }
  void* allocate(std::size_t bytes) override {
    const std::int64_t total = DeviceMemory::instance().total_bytes;
    if (held_bytes + static_cast<std::int64_t>(bytes) > total) {
      throw OutOfMemory(fmt::format("[cuda] no memory for {} bytes on cuda:0: {} of {} are free",
                                    bytes, total - held_bytes, total),
                        {DeviceKind::cuda, 0}, total - held_bytes);
    }
    held_bytes += static_cast<std::int64_t>(bytes);
    void* const at = DeviceMemory::instance().allocate(bytes);
    simt::add_memory(at, bytes, fmt::format("tensor {}", ++count_), false);
    return at;
  }
  void free(void* at, std::size_t bytes) noexcept override {
    held_bytes -= static_cast<std::int64_t>(bytes);
    simt::remove_memory(at);
    DeviceMemory::instance().free(at);
  }

 private:
  std::int64_t count_ = 0;
};

bool in_use = false;

// As a piece of the graph that compute is being captured into.
void keep(const char* name, std::function<void()> run) {
  Streams& streams = cuda_streams({DeviceKind::cuda, 0});
  dynamic_cast<testing::CudaStandIn&>(streams.calls())
      .work(streams.stream(StreamKind::compute), name, {}, {}, std::move(run));
}

}  // namespace

int cuda_device_count() {
  return 1;
}
Allocator& cuda_allocator(Device device) {
  if (device == host_of({DeviceKind::cuda, 0})) {
    static Allocator host(device, std::make_unique<Arena>());
    return host;
  }
  expect_present(device);
  in_use = true;
  static Allocator& instance = *new Allocator(device, std::make_unique<ShimMemory>());
  return instance;
}
std::vector<Device> cuda_devices_in_use() {
  return in_use ? std::vector<Device>{{DeviceKind::cuda, 0}} : std::vector<Device>{};
}
void cuda_copy(void* to, Device to_device, const void* from, Device from_device,
               std::size_t bytes) {
  const bool to_cuda = to_device.kind == DeviceKind::cuda;
  if (!to_cuda || from_device.kind != DeviceKind::cuda) {
    expect_not_capturing("cuda_copy", "the host reads or writes elements");
  }
  testing::on_device("copy", [=] {
    std::memcpy(to, from, bytes);
    if (to_cuda) {
      simt::define_memory(to, bytes);
    }
  });
  if (!to_cuda) {
    throw_fault(*cuda_fault_word({DeviceKind::cuda, 0}));
  }
}
void cuda_zero(void* at, Device, std::size_t bytes) {
  testing::on_device("zero", [=] {
    simt::define_memory(at, bytes);
    if (!simt::options().corners) {  // it would become real memory
      std::memset(at, 0, bytes);
    }
  });
}
void cuda_synchronize(Device device) {
  expect_not_capturing("cuda_synchronize", "the host waits for the device");
  expect_present(device);
  throw_fault(*cuda_fault_word(device));
}
// Memory of the host's that kernels may touch, too.
DeviceFault* cuda_fault_word(Device) {
  static DeviceFault& word = [&]() -> DeviceFault& {
    static DeviceFault instance;
    simt::add_memory(&instance, sizeof instance, "the fault word", true);
    return instance;
  }();
  return &word;
}
CudaBytes cuda_bytes(Device device) {
  const std::int64_t total_bytes = DeviceMemory::instance().total_bytes;
  (void)cuda_allocator(device);
  return {total_bytes - held_bytes, total_bytes};
}
// The host runs the kernels, so it is the compute stream.
Streams& cuda_streams(Device device) {
  expect_present(device);
  static Streams instance([] {
    testing::CudaStandIn::Options options;
    options.first_stream_is_host = true;
    options.copy = [](void* to, const void* from, std::size_t bytes) {
      const DeviceMemory::Access access;
      std::memcpy(to, from, bytes);
      if (DeviceMemory::instance().holds(to)) {
        simt::define_memory(to, bytes);
      }
    };
    simt::set_capture({.capturing = capturing, .keep = keep});
    return std::make_shared<testing::CudaStandIn>(options);
  }());
  return instance;
}
void* cuda_stream(Device device) {
  return cuda_streams(device).stream(StreamKind::compute);
}
int cuda_wait(void*) {
  return std::exchange(DeviceMemory::instance().next_status, 0);
}
void cuda_check(const char* operation, int status) {
  if (status != 0) {
    const std::string advice = cuda_advice(status);
    fail(operation, "CUDA: status {}{}{}", status, advice.empty() ? "" : ": ", advice);
  }
}

}  // namespace reprise

namespace reprise::testing {

void on_device(const char* name, const std::function<void()>& work) {
  const auto run = [work] {
    const DeviceMemory::Access access;
    work();
  };
  capturing() ? keep(name, run) : run();
}

// Threads and blocks in ascending, descending and two shuffled orders.
int schedule_count(Device device) {
  return device.kind == DeviceKind::cuda ? 4 : 1;
}

void set_schedule(Device, int schedule) {
  simt::options().order = schedule == 0   ? simt::Order::ascending
                          : schedule == 1 ? simt::Order::descending
                                          : simt::Order::shuffled;
  simt::options().seed = static_cast<unsigned>(schedule);
}

}  // namespace reprise::testing
