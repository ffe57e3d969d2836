// The masks of dropout.h in device code.
#pragma once

#include "kernels/dropout_sides.h"
#include "kernels/matrix.cuh"
#include "kernels/philox.cuh"

namespace reprise::kernels::cuda {

// The run whose first element is element `index` of the rows taken together, dropped and scaled.
__device__ __forceinline__ Run drop(const DropoutMask& mask, std::int64_t index, Run run) {
  const int skip = static_cast<int>(index % 4);
  const std::uint64_t first =
      shifted(mask.offset, mask.shift) + static_cast<std::uint64_t>(index / 4);
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
