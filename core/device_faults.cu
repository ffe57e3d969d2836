#include "core/device_faults.h"
#include "core/launch.cuh"

namespace reprise {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct __align__(16) TwoNumbers {
  std::int64_t at[2];
};

struct Seen {
  std::int64_t first, valid;  // the smallest wrong index, or the count; numbers in range
};

__device__ __forceinline__ void look(const IndexCheck& check, std::int64_t i, std::int64_t value,
                                     Seen& seen) {
  if (check.ignores && value == check.ignored) {
    return;
  }
  if (value >= 0 && value < check.limit) {
    ++seen.valid;
  } else {
    seen.first = i < seen.first ? i : seen.first;
  }
}

__device__ __forceinline__ Seen both(const Seen& a, const Seen& b) {
  return {a.first < b.first ? a.first : b.first, a.valid + b.valid};
}

// One block, so that which wrong number is named does not depend on timing.
__global__ void __launch_bounds__(kThreads) check_kernel(IndexCheck check, DeviceFault* word) {
  __shared__ Seen of_warp[kWarps];
  Seen seen{check.count, 0};
  const bool aligned = reinterpret_cast<std::uintptr_t>(check.at) % sizeof(TwoNumbers) == 0;
  const std::int64_t pairs = aligned ? check.count / 2 : 0;
  for (std::int64_t pair = threadIdx.x; pair < pairs; pair += kThreads) {
    const TwoNumbers two = reinterpret_cast<const TwoNumbers*>(check.at)[pair];
    look(check, 2 * pair, two.at[0], seen);
    look(check, 2 * pair + 1, two.at[1], seen);
  }
  for (std::int64_t i = 2 * pairs + threadIdx.x; i < check.count; i += kThreads) {
    look(check, i, check.at[i], seen);
  }
  for (int lane = 16; lane > 0; lane /= 2) {
    const Seen other{__shfl_xor_sync(kAllLanes, seen.first, lane),
                     __shfl_xor_sync(kAllLanes, seen.valid, lane)};
    seen = both(seen, other);
  }
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = seen;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) {
      seen = both(seen, of_warp[warp]);
    }
    if (check.valid != nullptr) {
      *check.valid = seen.valid;
    }
    if (seen.first < check.count && word->site == 0) {
      *word = {check.site, seen.first, check.at[seen.first], check.limit, check.ignored};
    }
  }
}

}  // namespace

void launch_index_check(const IndexCheck& check, DeviceFault* word, void* stream) {
  launch("check_indices", check_kernel, {dim3(1), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), check, word);
}

}  // namespace reprise
