// The random words of core/philox.h on a device.
#pragma once

#include "kernels/device.cuh"

namespace reprise::kernels::cuda {

struct PhiloxWords {
  std::uint32_t at[4];
};

// As philox() there.
__device__ __forceinline__ PhiloxWords philox(std::uint64_t seed, std::uint64_t offset) {
  std::uint32_t c0 = static_cast<std::uint32_t>(offset);
  std::uint32_t c1 = static_cast<std::uint32_t>(offset >> 32), c2 = 0, c3 = 0;
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t upper0 = __umulhi(0xD2511F53u, c0), lower0 = 0xD2511F53u * c0;
    const std::uint32_t upper2 = __umulhi(0xCD9E8D57u, c2), lower2 = 0xCD9E8D57u * c2;
    c0 = upper2 ^ c1 ^ key0;
    c1 = lower2;
    c2 = upper0 ^ c3 ^ key1;
    c3 = lower0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The offset of a launch, `shift` read where there is one (core/step_graph.h).
__device__ __forceinline__ std::uint64_t shifted(std::uint64_t offset, const std::uint64_t* shift) {
  return shift == nullptr ? offset : offset + __ldg(shift);
}

}  // namespace reprise::kernels::cuda
