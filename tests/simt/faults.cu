#include "kernels/device.cuh"
#include "tests/simt/faults.h"

namespace simt {
namespace {

using namespace reprise;
using namespace reprise::kernels::cuda;

constexpr int kThreads = 64;

// ---- races -------------------------------------------------------------------------------------

__global__ void no_barrier_after_write(float* out, const float* in) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x;
  s[t] = in[t];
  out[t] = s[kThreads - 1 - t];
}

__global__ void no_barrier_before_write(float* out, const float* in) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x;
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    s[t] = in[t + i];
    __syncthreads();
    sum += s[kThreads - 1 - t];
  }
  out[t] = sum;
}

__global__ void no_syncwarp(float* out, const float* in) {
  __shared__ float s[32];
  const unsigned t = threadIdx.x;
  s[t] = in[t];
  out[t] = s[(t + 1) % 32];
}

__global__ void shuffle_is_no_fence(float* out, const float* in) {
  __shared__ float s[32];
  const unsigned t = threadIdx.x;
  s[t] = in[t];
  const float sum = warp_sum(in[t]);
  out[t] = s[(t + 1) % 32] + sum;
}

__global__ void syncwarp_is_no_barrier(float* out, const float* in) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x;
  s[t] = in[t];
  __syncwarp();
  out[t] = s[(t + 32) % kThreads];
}

__global__ void global_within_a_block(float* out, const float* in) {
  const unsigned t = threadIdx.x;
  out[t / 2] = in[t];
}

__global__ void global_read_then_written(float* out, const float* in) {
  const unsigned t = threadIdx.x;
  out[t] = in[t];
  __syncthreads();
  const float next = out[(t + 1) % kThreads];
  out[t] = next;
}

__global__ void written_by_two_blocks(float* out, const float* in) {
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void read_by_another_block(float* out, const float* in) {
  const unsigned t = blockIdx.x * 32 + threadIdx.x;
  out[t] = in[t];
  if (blockIdx.x == 1) {
    out[t] += out[threadIdx.x];
  }
}

__global__ void atomic_against_plain(float* out, const float* in) {
  if (threadIdx.x == 0) {
    out[0] = in[0];
  }
  __syncthreads();
  if (threadIdx.x == 1) {
    out[0] = 1.0f;
  } else {
    atomicAdd(out, in[threadIdx.x]);
  }
}

// ---- bounds and alignment ----------------------------------------------------------------------

__global__ void one_past_the_tensor(float* out, const float* in) {
  out[threadIdx.x] = in[kElements - kThreads + 1 + threadIdx.x];
}

__global__ void one_before_the_tensor(float* out, const float* in) {
  out[static_cast<int>(threadIdx.x) - 1] = in[threadIdx.x];
}

__global__ void one_past_dynamic_shared(float* out, const float* in) {
  float* s = dynamic_shared<float>();
  s[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void one_before_dynamic_shared(float* out, const float* in) {
  float* s = dynamic_shared<float>();
  s[static_cast<int>(threadIdx.x) - 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void one_past_static_shared(float* out, const float* in) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x;
  s[t + 1] = in[t];
  __syncthreads();
  out[t] = s[t + 1];
}

__global__ void one_before_static_shared(float* out, const float* in) {
  __shared__ float s[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  s[t] = in[t];
  __syncthreads();
  out[t] = s[t - 1];
}

__global__ void beyond_a_local_array(float* out, const float* in) {
  float local[4] = {in[0], in[1], in[2], in[3]};
  out[threadIdx.x] = local[threadIdx.x / 8];
}

__global__ void misaligned_packet(float* out, const float* in) {
  store_packet(out + 4 * threadIdx.x, load_packet<4>(in + 4 * threadIdx.x + 1));
}

// ---- uninitialised memory ----------------------------------------------------------------------

__global__ void static_shared_unwritten(float* out, const float* in) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x;
  if (t != 7) {
    s[t] = in[t];
  }
  __syncthreads();
  out[t] = s[t];
}

__global__ void dynamic_shared_unwritten(float* out, const float*) {
  out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x];
}

__global__ void shared_left_by_a_block(float* out, const float* in) {
  __shared__ float s[32];
  const unsigned t = threadIdx.x;
  if (blockIdx.x == 1) {
    s[t] = in[t];
  }
  __syncthreads();
  out[blockIdx.x * 32 + t] = s[t];
}

__global__ void tensor_unwritten(float* out, const float*) {
  out[threadIdx.x] = out[threadIdx.x + kThreads] + 1.0f;
}

// ---- barriers ----------------------------------------------------------------------------------

__global__ void barrier_in_a_branch(float* out, const float* in) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void return_before_a_barrier(float* out, const float* in) {
  if (threadIdx.x >= 50) {
    return;
  }
  out[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
}

__global__ void barriers_on_two_lines(float* out, const float* in) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
  } else {
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
  }
}

__global__ void barrier_in_an_uneven_loop(float* out, const float* in) {
  float sum = 0;
  for (unsigned i = 0; i < 2 + threadIdx.x / 32; ++i) {
    sum += in[threadIdx.x];
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// ---- masks and deadlock ------------------------------------------------------------------------

__global__ void mask_without_the_caller(float* out, const float* in) {
  out[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, in[threadIdx.x], 1);
}

__global__ void mask_with_returned_lanes(float* out, const float* in) {
  if (threadIdx.x % 32 >= 16) {
    return;
  }
  out[threadIdx.x] = warp_sum(in[threadIdx.x]);
}

__global__ void mask_with_absent_lanes(float* out, const float* in) {
  out[threadIdx.x] = warp_sum(in[threadIdx.x]);
}

__global__ void masks_that_differ(float* out, const float* in) {
  const unsigned mask = threadIdx.x % 2 == 0 ? 0xffffffffu : 0xfffffffeu | 1u << threadIdx.x;
  const unsigned own = threadIdx.x == 3 ? 0xfffffffeu : mask;
  out[threadIdx.x] = __shfl_sync(own, in[threadIdx.x], 3);
}

__global__ void shuffle_from_outside_the_mask(float* out, const float* in) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_down_sync(0xffffu, in[threadIdx.x], 8);
  }
}

__global__ void collective_against_barrier(float* out, const float* in) {
  if (threadIdx.x == 5) {
    __syncthreads();
  }
  const float sum = warp_sum(in[threadIdx.x]);
  if (threadIdx.x != 5) {
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// ---- correct -----------------------------------------------------------------------------------

__global__ void sum_of_a_block(float* out, const float* in) {
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    sum += block_sum<kThreads>(in[threadIdx.x + i]);
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void half_warps_of_their_own(float* out, const float* in) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x, half = t % 32 / 16;
  const unsigned mask = 0xffffu << 16 * half;
  s[t] = in[t];
  for (unsigned i = 0; i < 2 + half; ++i) {  // halves meet a different number of times
    __syncwarp(mask);
    const float next = s[t / 16 * 16 + (t + 1) % 16];
    __syncwarp(mask);
    s[t] = next + __shfl_xor_sync(mask, next, 3);
  }
  __syncwarp();
  out[t] = s[t ^ 31];
}

__global__ void atomics_of_all_blocks(float* out, const float* in) {
  atomicAdd(out + threadIdx.x % 4, in[threadIdx.x]);
}

__global__ void tile_turned_over(float* out, const float* in) {
  __shared__ __align__(16) float tile[16][16];
  const unsigned row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
  store_packet(&tile[row][column], load_packet<4>(in + row * 16 + column));
  __syncthreads();
  for (unsigned i = 0; i < 4; ++i) {
    out[(column + i) * 16 + row] = tile[row][column + i];
  }
}

__global__ void votes(float* out, const float* in) {
  const int count = __syncthreads_count(threadIdx.x < 10);
  const int all = __syncthreads_and(threadIdx.x < 64), any = __syncthreads_or(threadIdx.x == 64);
  const unsigned odd = __ballot_sync(kAllLanes, static_cast<int>(threadIdx.x % 2));
  const float next = __shfl_down_sync(kAllLanes, in[threadIdx.x], 1, 8);
  const float first = __shfl_sync(kAllLanes, in[threadIdx.x], 0, 16);
  const bool right = count == 10 && all == 1 && any == 0 && odd == 0xaaaaaaaau &&
                     next == in[threadIdx.x % 8 == 7 ? threadIdx.x : threadIdx.x + 1] &&
                     first == in[threadIdx.x / 16 * 16];
  out[threadIdx.x] = right ? 1.0f : 0.0f;
}

// Right for small grids only.
__global__ void index_of_32_bits(float* out, const float* in) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  out[i] = in[threadIdx.x];
}

template <auto kernel, unsigned blocks, unsigned threads, std::size_t shared_bytes>
void start(float* out, const float* in) {
  launch("planted", kernel, {dim3(blocks), dim3(threads), shared_bytes}, nullptr, out, in);
}

}  // namespace

void start_wide(float* out, const float* in, unsigned blocks) {
  launch("planted", index_of_32_bits, {dim3(blocks), dim3(kThreads)}, nullptr, out, in);
}

#define PLANTED(kind, kernel, blocks, threads, shared_bytes)       \
  Planted {                                                        \
#kernel, kind, &start < kernel, blocks, threads, shared_bytes> \
  }

std::vector<Planted> planted_faults() {
  return {
      PLANTED("race", no_barrier_after_write, 1, 64, 0),
      PLANTED("race", no_barrier_before_write, 1, 64, 0),
      PLANTED("race", no_syncwarp, 1, 32, 0),
      PLANTED("race", shuffle_is_no_fence, 1, 32, 0),
      PLANTED("race", syncwarp_is_no_barrier, 1, 64, 0),
      PLANTED("race", global_within_a_block, 1, 64, 0),
      PLANTED("race", global_read_then_written, 1, 64, 0),
      PLANTED("race", written_by_two_blocks, 2, 32, 0),
      PLANTED("race", read_by_another_block, 2, 32, 0),
      PLANTED("race", atomic_against_plain, 1, 64, 0),
      PLANTED("out of bounds", one_past_the_tensor, 1, 64, 0),
      PLANTED("out of bounds", one_before_the_tensor, 1, 64, 0),
      PLANTED("out of bounds", one_past_dynamic_shared, 1, 64, 64 * 4),
      PLANTED("out of bounds", one_before_dynamic_shared, 1, 64, 64 * 4),
      PLANTED("out of bounds", one_past_static_shared, 1, 64, 0),
      PLANTED("out of bounds", one_before_static_shared, 1, 64, 0),
      PLANTED("out of bounds", beyond_a_local_array, 1, 64, 0),
      PLANTED("misaligned", misaligned_packet, 1, 32, 0),
      PLANTED("uninitialised", static_shared_unwritten, 1, 64, 0),
      PLANTED("uninitialised", dynamic_shared_unwritten, 1, 64, 64 * 4),
      PLANTED("uninitialised", shared_left_by_a_block, 3, 32, 0),
      PLANTED("uninitialised", tensor_unwritten, 1, 64, 0),
      PLANTED("divergent barrier", barrier_in_a_branch, 1, 64, 0),
      PLANTED("divergent barrier", return_before_a_barrier, 1, 64, 0),
      PLANTED("divergent barrier", barriers_on_two_lines, 1, 64, 0),
      PLANTED("divergent barrier", barrier_in_an_uneven_loop, 1, 64, 0),
      PLANTED("mask", mask_without_the_caller, 1, 32, 0),
      PLANTED("mask", mask_with_returned_lanes, 1, 32, 0),
      PLANTED("mask", mask_with_absent_lanes, 1, 40, 0),
      PLANTED("mask", masks_that_differ, 1, 32, 0),
      PLANTED("mask", shuffle_from_outside_the_mask, 1, 32, 0),
      PLANTED("deadlock", collective_against_barrier, 1, 32, 0),
      PLANTED("launch", no_syncwarp, 1, 2048, 0),
      PLANTED("launch", no_syncwarp, 1, 32, 1 << 20),
      PLANTED("", sum_of_a_block, 4, 64, 0),
      PLANTED("", half_warps_of_their_own, 1, 64, 0),
      PLANTED("", atomics_of_all_blocks, 3, 64, 0),
      PLANTED("", tile_turned_over, 1, 64, 0),
      PLANTED("", votes, 1, 64, 0),
  };
}

}  // namespace simt
