// What the CUDA kernels are written with: launching, packets of 128 bits, sums over a warp or a
// block, bf16. Device code is written once for two compilers: nvcc, and g++ for the
// SIMT shim of the tests (see tests/simt/simt.h), which runs it on the host and checks it.
//
// Rules for kernels
// - Start one with launch(), have dynamic shared memory by dynamic_shared<T>(), touch 128 bits by
//   load_packet and store_packet.
// - Blocks are multiples of 32. No return before a barrier; every thread takes the same barrier
//   line; a collective inside a branch names exactly the lanes that take it.
// - __syncwarp() between lanes that share memory, also after a shuffle: a shuffle orders no memory.
// - __shared__ __align__(16) where packets touch it: the host aligns more than the device does.
// - No atomics for sums and no "last block done": a second launch, so that sums have one order.
// - No memcpy in device code, no function-static variable but __shared__, no local address handed
//   to another thread, no inline PTX, no cooperative groups, no __activemask.
// - bf16 is storage; arithmetic is in float through to_float and from_float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#elif !defined(REPRISE_SIMT)
#error "a .cu file is compiled by nvcc, or for the SIMT shim with -include tests/simt/simt.h"
#endif

namespace reprise::kernels::cuda {

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
  const auto call = [&]() __attribute__((no_sanitize("thread"))) {
    kernel(P(arguments)...);
  };
  simt::run(
      name, shape.grid, shape.block, shape.shared_bytes,
      [](const void* at)
          __attribute__((no_sanitize("thread"))) { (*static_cast<decltype(call)*>(at))(); },
      &call);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared_memory());
}

#endif

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return __float2bfloat16_rn(x);
  }
}

// e^x; 0 below 2^-100, which no sum beside a 1 can tell: no gradient is subnormal.
__device__ __forceinline__ float probability(float x) {
  return x < -69.3147181f ? 0.0f : expf(x);
}

// n elements that one thread moves at once.
template <class T, int n>
struct __align__(sizeof(T) * n) Packet {
  T at[n];
};
// Elements of 128 bits.
template <class T>
inline constexpr int kPacket = 16 / static_cast<int>(sizeof(T));

// `from` and `to` are aligned to the packet.
template <int n, class T>
__device__ __forceinline__ Packet<T, n> load_packet(const T* from) {
  return *reinterpret_cast<const Packet<T, n>*>(from);
}
template <class T, int n>
__device__ __forceinline__ void store_packet(T* to, const Packet<T, n>& packet) {
  *reinterpret_cast<Packet<T, n>*>(to) = packet;
}

inline constexpr unsigned kAllLanes = 0xffffffffu;

// The same in every lane; in one order, whatever the timing. All lanes take part.
__device__ __forceinline__ float warp_sum(float value) {
  for (int lane = 16; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lane);
  }
  return value;
}

// The same in every thread of a block of `threads` in one dimension; all take part.
template <int threads>
__device__ __forceinline__ float block_sum(float value) {
  static_assert(threads % 32 == 0);
  __shared__ float of_warp[threads / 32];
  const float warp = warp_sum(value);
  __syncthreads();  // the sums of an earlier call have been read
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = warp;
  }
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < threads / 32; ++i) {
    sum += of_warp[i];
  }
  return sum;
}

}  // namespace reprise::kernels::cuda
