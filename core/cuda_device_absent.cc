// The cuda device of a build without CUDA.
#include "core/cuda_device.h"
#include "core/error.h"

namespace reprise {
namespace {

[[noreturn]] void absent() {
  fail("cuda",
       "this build has no CUDA: install the CUDA toolkit (nvcc 12.1 or later) and configure with "
       "the "
       "preset 'cuda'");
}

}  // namespace

int cuda_device_count() {
  return 0;
}
Allocator& cuda_allocator(Device) {
  absent();
}
Streams& cuda_streams(Device) {
  absent();
}
std::vector<Device> cuda_devices_in_use() {
  return {};
}
void cuda_copy(void*, Device, const void*, Device, std::size_t) {
  absent();
}
void cuda_zero(void*, Device, std::size_t) {
  absent();
}
void cuda_copy_strided(void*, const void*, Device, std::span<const CopyLoop>, std::size_t) {
  absent();
}
void cuda_write(void*, Device, const void*, std::size_t) {
  absent();
}
void cuda_fill(void*, Device, std::int64_t, const void*, std::size_t) {
  absent();
}
void launch_index_check(const IndexCheck&, DeviceFault*, void*) {
  absent();
}
DeviceFault* cuda_fault_word(Device) {
  absent();
}
void* cuda_stream(Device) {
  absent();
}
int cuda_wait(void*) {
  absent();
}
void cuda_check(const char*, int) {
  absent();
}
void cuda_synchronize(Device) {
  absent();
}
CudaBytes cuda_bytes(Device) {
  absent();
}

}  // namespace reprise
