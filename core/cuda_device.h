// The cuda device behind plain functions, so that nothing above core needs a CUDA header. A build
// without CUDA has them too: there they throw Error and say what to install.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/allocator.h"
#include "core/device.h"
#include "core/device_faults.h"
#include "core/streams.h"

namespace reprise {

// Number of usable devices; 0 without a driver, a device, or CUDA in the build.
int cuda_device_count();
// Of a cuda device, or of its page-locked host memory (host_of). Throws Error when the device is
// not there.
Allocator& cuda_allocator(Device device);
// The streams of the device; compute is cuda_stream(). Throws Error when it is not there.
Streams& cuda_streams(Device device);
// Devices whose allocator exists: memory was asked of them.
std::vector<Device> cuda_devices_in_use();
// Copies between host and device, or between devices, in order of the current stream; returns
// when the host may touch its side again. Throws what the device has found wrong (device_faults.h)
// where it waits for it.
void cuda_copy(void* to, Device to_device, const void* from, Device from_device, std::size_t bytes);
void cuda_zero(void* at, Device device, std::size_t bytes);
// One dimension of a strided copy; strides in elements.
struct CopyLoop {
  std::int64_t size, to_stride, from_stride;
};
// Elements of 2, 4 or 8 bytes within one device, by a kernel, in order of its stream. At most as
// many loops as a shape has dimensions, outermost first, none of size 0. `from` null: zeros.
void cuda_copy_strided(void* to, const void* from, Device device, std::span<const CopyLoop> loops,
                       std::size_t element_bytes);
// Numbers that are the same whenever the step is done, a multiple of 4 bytes and few: they travel
// with the launch of a kernel, so that they may be part of a captured step, and nobody waits.
void cuda_write(void* to, Device device, const void* from, std::size_t bytes);
// `count` elements of 2, 4 or 8 bytes, all as the one at `element` is on the host.
void cuda_fill(void* to, Device device, std::int64_t count, const void* element,
               std::size_t element_bytes);
// Waits for compute; then throws what the device has found wrong.
void cuda_synchronize(Device device);
// Where the device writes down what it finds wrong.
DeviceFault* cuda_fault_word(Device device);
// Of the whole device, other programs' use counted, as the driver says.
struct CudaBytes {
  std::int64_t free_bytes, total_bytes;
};
CudaBytes cuda_bytes(Device device);
// The cudaStream_t on which kernels and copies of the device run. Makes the device current on this
// thread, as a launch on that stream wants it.
void* cuda_stream(Device device);
// Waits for a stream; returns the cudaError_t of what was given to it, and throws nothing.
int cuda_wait(void* stream);
// Throws Error with the runtime's text, naming the operation, unless `status` (a cudaError_t) is
// success.
void cuda_check(const char* operation, int status);

}  // namespace reprise
