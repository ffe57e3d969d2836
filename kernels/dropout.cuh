// The masks of dropout.h in device code.
#pragma once

#include "kernels/dropout_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {

struct PhiloxWords {
  std::uint32_t at[4];
};

// As philox() in core/philox.h.
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

// The run whose first element is element `index` of the rows taken together, dropped and scaled.
__device__ __forceinline__ Run drop(const DropoutMask& mask, std::int64_t index, Run run) {
  const int skip = static_cast<int>(index % 4);
  const std::uint64_t first = mask.offset + static_cast<std::uint64_t>(index / 4);
  const PhiloxWords a = philox(mask.seed, first), b = philox(mask.seed, first + 1);
  PhiloxWords c = {};
  if (skip > 0) {
    c = philox(mask.seed, first + 2);
  }
  const std::uint32_t words[12] = {a.at[0], a.at[1], a.at[2], a.at[3], b.at[0], b.at[1],
                                   b.at[2], b.at[3], c.at[0], c.at[1], c.at[2], c.at[3]};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    // Not words[i + skip]: an index that is not known puts an array into memory.
    const std::uint32_t word = skip == 0   ? words[i]
                               : skip == 1 ? words[i + 1]
                               : skip == 2 ? words[i + 2]
                                           : words[i + 3];
    run.at[i] = (word >> 8) < mask.threshold ? 0.0f : run.at[i] * mask.scale;
  }
  return run;
}

}  // namespace reprise::kernels::cuda
