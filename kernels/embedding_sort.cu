// Sorts the ids of an embedding with their positions: by digits from the lowest, each pass keeping
// the order of before among equal digits, so that positions of an id ascend. A pass has three
// launches: the digits of each tile are counted, the counts added up to where each tile's digits
// go, and the tiles written there.
#include "kernels/device.cuh"
#include "kernels/embedding_sides.h"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads == kDigits);  // a thread a digit
static_assert(kSortTile % kThreads == 0);

struct Pass {
  const std::int64_t* ids;
  std::int64_t count, rows, padding, tiles;
  const std::uint32_t *keys, *places;  // null in the first pass
  std::uint32_t *to_keys, *to_places, *counts;
  int shift;

  __device__ __forceinline__ std::uint32_t key(std::int64_t i) const {
    if (keys != nullptr) {
      return keys[i];
    }
    const std::int64_t id = ids[i];
    const bool none = id == padding || id < 0 || id >= rows;
    return static_cast<std::uint32_t>(none ? rows : id);
  }
  __device__ __forceinline__ std::uint32_t place(std::int64_t i) const {
    return places != nullptr ? places[i] : static_cast<std::uint32_t>(i);
  }
  __device__ __forceinline__ int digit(std::uint32_t of_key) const {
    return static_cast<int>(of_key >> shift) & (kDigits - 1);
  }
};

// counts[digit, tile]. The atomics add whole numbers: their order changes nothing.
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Pass pass) {
  __shared__ unsigned count[kDigits];
  count[threadIdx.x] = 0;
  __syncthreads();
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kSortTile;
  for (std::int64_t i = begin + threadIdx.x; i < begin + kSortTile && i < pass.count;
       i += kThreads) {
    atomicAdd(&count[pass.digit(pass.key(i))], 1u);
  }
  __syncthreads();
  pass.counts[threadIdx.x * pass.tiles + blockIdx.x] = count[threadIdx.x];
}

// counts become the sums of all before them. One block.
__global__ void __launch_bounds__(kThreads)
    add_up_kernel(std::uint32_t* counts, std::int64_t total) {
  __shared__ unsigned of_warp[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  unsigned before = 0;
  for (std::int64_t first = 0; first < total; first += kThreads) {
    const std::int64_t i = first + threadIdx.x;
    const unsigned own = i < total ? counts[i] : 0;
    unsigned sum = own;
    for (unsigned distance = 1; distance < 32; distance *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, sum, distance);
      sum += lane >= static_cast<int>(distance) ? other : 0;
    }
    if (lane == 31) {
      of_warp[warp] = sum;
    }
    __syncthreads();
    unsigned all = 0, earlier = 0;
    for (int w = 0; w < kWarps; ++w) {
      earlier += w < warp ? of_warp[w] : 0;
      all += of_warp[w];
    }
    if (i < total) {
      counts[i] = before + earlier + sum - own;
    }
    before += all;
    __syncthreads();
  }
}

// The lanes of the warp that are there and have the same digit.
__device__ __forceinline__ unsigned same_digit(int digit, bool there) {
  unsigned same = __ballot_sync(kAllLanes, there);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool set = (digit >> bit & 1) != 0;
    const unsigned ballot = __ballot_sync(kAllLanes, set);
    same &= set ? ballot : ~ballot;
  }
  return same;
}

// A tile goes where its digits do, a thread an id at a time; thread t keeps where digit t is.
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ Pass pass) {
  __shared__ unsigned of_warp[kWarps][kDigits];  // of the ids at hand: counts, then places
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kSortTile;
  unsigned next = pass.counts[thread * pass.tiles + blockIdx.x];
  for (std::int64_t first = begin; first < begin + kSortTile && first < pass.count;
       first += kThreads) {
    for (int w = 0; w < kWarps; ++w) {
      of_warp[w][thread] = 0;
    }
    __syncthreads();
    const std::int64_t i = first + thread;
    const bool there = i < pass.count;
    const std::uint32_t key = there ? pass.key(i) : 0;
    const int digit = pass.digit(key);
    const unsigned same = same_digit(digit, there);
    const unsigned before = same & ((1u << lane) - 1);
    if (there && before == 0) {
      of_warp[warp][digit] = static_cast<unsigned>(__popc(same));
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      const unsigned count = of_warp[w][thread];
      of_warp[w][thread] = next;
      next += count;
    }
    __syncthreads();
    if (there) {
      const unsigned to = of_warp[warp][digit] + static_cast<unsigned>(__popc(before));
      pass.to_keys[to] = key;
      pass.to_places[to] = pass.place(i);
    }
    __syncthreads();
  }
}

}  // namespace

SortedIds sort_ids(const EmbeddingGradient& call, const EmbeddingWorkspace& workspace,
                   void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto part = [&](std::int64_t at) {
    return reinterpret_cast<std::uint32_t*>(static_cast<char*>(call.workspace) + at);
  };
  const LaunchShape tiles{dim3(static_cast<unsigned>(workspace.tiles)), dim3(kThreads)};
  Pass pass{call.ids, call.count, call.rows, call.padding, workspace.tiles,
            nullptr,  nullptr,    nullptr,   nullptr,      part(workspace.counts),
            0};
  const int passes = sort_passes(call.rows);
  for (int i = 0; i < passes; ++i) {
    pass.shift = i * kDigitBits;
    pass.to_keys = part(workspace.keys[i % 2]);
    pass.to_places = part(workspace.places[i % 2]);
    launch("embedding_count", count_kernel, tiles, on, pass);
    launch("embedding_add_up", add_up_kernel, {dim3(1), dim3(kThreads)}, on, pass.counts,
           kDigits * workspace.tiles);
    launch("embedding_place", place_kernel, tiles, on, pass);
    pass.keys = pass.to_keys;
    pass.places = pass.to_places;
  }
  return {pass.keys, pass.places};
}

}  // namespace reprise::kernels::cuda
