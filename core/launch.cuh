// How a kernel starts, and has its dynamic shared memory: written once for two compilers, nvcc and
// g++ for the SIMT shim of the tests. The rules for kernels are in kernels/device.cuh.
#pragma once

#include <cstddef>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#elif !defined(REPRISE_SIMT)
#error "a .cu file is compiled by nvcc, or for the SIMT shim with -include tests/simt/simt.h"
#endif

namespace reprise {

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;  // dynamic
};

#if defined(__CUDACC__)

// Starts a kernel in order of the stream; in checked mode waits for it. `name` stands in errors.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), LaunchShape shape, cudaStream_t stream,
            const A&... arguments) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    cuda_check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  const cudaError_t later =
      status == cudaSuccess && cuda_checked() ? cudaStreamSynchronize(stream) : cudaSuccess;
  if (status != cudaSuccess || later != cudaSuccess) [[unlikely]] {
    const auto [grid, block, shared_bytes] = shape;
    fail_launch(name, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes},
                status == cudaSuccess, status == cudaSuccess ? later : status);
  }
}

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

#else

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), LaunchShape shape, cudaStream_t,
            const A&... arguments) {
  const auto call = [=]() __attribute__((no_sanitize("thread"))) {
    kernel(P(arguments)...);
  };
  using Call = decltype(call);
  const simt::Body body = [](const void* at) __attribute__((no_sanitize("thread"))) {
    (*static_cast<Call*>(at))();
  };
  if (simt::capturing()) {
    simt::capture(name, shape.grid, shape.block, shape.shared_bytes, body, new Call(call),
                  [](const void* at) { delete static_cast<Call*>(at); });
  } else {
    simt::run(name, shape.grid, shape.block, shape.shared_bytes, body, &call);
  }
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared_memory());
}

#endif

}  // namespace reprise
