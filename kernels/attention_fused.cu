// Where the sequences of a call begin that the library's kernels take.
#include "kernels/attention_fused.h"
#include "kernels/device.cuh"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Tokens of rows that are padded on the right, one block a row: [2, B].
__global__ void __launch_bounds__(kThreads)
    tokens_kernel(const std::int64_t* mask, std::int64_t S, int T, int* tokens) {
  const std::int64_t b = blockIdx.x;
  int count = 0;
  for (std::int64_t j = threadIdx.x; j < S; j += kThreads) {
    count += mask[b * S + j] != 0 ? 1 : 0;
  }
  const float sum = block_sum<kThreads>(static_cast<float>(count));  // exact: below 2^24
  if (threadIdx.x == 0) {
    tokens[b] = T;
    tokens[gridDim.x + b] = static_cast<int>(sum);
  }
}

struct Begins {
  FusedStrides strides[kFusedRagged];
};

__device__ __forceinline__ bool begins(const std::int64_t* bounds, std::int64_t b, std::int64_t t,
                                       std::int64_t T) {
  return bounds[2 * b * T + t] == t;
}

// Documents as sequences: how many tokens each has, [2, N], and where it begins in each tensor,
// [kFusedRagged, N + 1]. One block a row, which counts the documents before its own.
__global__ void __launch_bounds__(kThreads)
    sequences_kernel(const std::int64_t* bounds, std::int64_t T, int N,
                     const __grid_constant__ Begins where, int* tokens, std::int64_t* offsets) {
  __shared__ int of_warp[kThreads / 32];
  const std::int64_t b = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int count = 0;
  for (std::int64_t at = threadIdx.x; at < b * T; at += kThreads) {
    count += begins(bounds, at / T, at % T, T) ? 1 : 0;
  }
  int before = static_cast<int>(block_sum<kThreads>(static_cast<float>(count)));
  for (std::int64_t first = 0; first < T; first += kThreads) {
    const std::int64_t t = first + threadIdx.x;
    const bool is_first = t < T && begins(bounds, b, t, T);
    const unsigned ballot = __ballot_sync(kAllLanes, is_first);
    if (lane == 0) {
      of_warp[warp] = __popc(ballot);
    }
    __syncthreads();
    int rank = before + __popc(ballot & ((1u << lane) - 1));
    for (int i = 0; i < kThreads / 32; ++i) {
      rank += i < warp ? of_warp[i] : 0;
      before += of_warp[i];
    }
    __syncthreads();
    if (is_first && rank < N) {
      tokens[rank] = tokens[N + rank] = static_cast<int>(bounds[(2 * b + 1) * T + t] - t);
      for (int i = 0; i < static_cast<int>(kFusedRagged); ++i) {
        const FusedStrides& s = where.strides[i];
        offsets[static_cast<std::int64_t>(i) * (N + 1) + rank] = b * s.batch + t * s.token;
      }
    }
  }
  if (b + 1 == static_cast<std::int64_t>(gridDim.x)) {  // the same for the block
    for (int rank = before + static_cast<int>(threadIdx.x); rank <= N; rank += kThreads) {
      if (rank < N) {
        tokens[rank] = tokens[N + rank] = 0;
      }
      for (int i = 0; i < static_cast<int>(kFusedRagged); ++i) {
        const FusedStrides& s = where.strides[i];
        offsets[static_cast<std::int64_t>(i) * (N + 1) + rank] = b * s.batch + T * s.token;
      }
    }
  }
}

// An element a thread: a rare path, of any stride.
__global__ void __launch_bounds__(kThreads)
    copy_heads_kernel(const __grid_constant__ AttentionHeads from, std::uint16_t* to,
                      std::int64_t T, std::int64_t heads, std::int64_t D, std::int64_t count) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) {
    const std::int64_t d = at % D, h = at / D % heads, t = at / (D * heads) % T;
    const std::int64_t b = at / (D * heads * T);
    const char* const row = from.at + b * from.batch + t * from.token + h * from.head;
    to[at] = reinterpret_cast<const std::uint16_t*>(row)[d];
  }
}

}  // namespace

void copy_heads(const AttentionHeads& from, void* to, std::int64_t B, std::int64_t T,
                std::int64_t heads, std::int64_t D, void* stream) {
  const std::int64_t count = B * T * heads * D;
  launch("attention_copy", copy_heads_kernel,
         {dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), from, static_cast<std::uint16_t*>(to), T, heads, D,
         count);
}

void find_sequences(const AttentionCall& call, const FusedGraph& graph, void* tokens, void* offsets,
                    void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const LaunchShape shape{dim3(static_cast<unsigned>(call.B)), dim3(kThreads)};
  if (!graph.ragged) {
    launch("attention_tokens", tokens_kernel, shape, on, call.mask, call.S,
           static_cast<int>(call.T), static_cast<int*>(tokens));
    return;
  }
  Begins where;
  for (std::size_t i = 0; i < kFusedRagged; ++i) {
    where.strides[i] = graph.strides[i];
  }
  launch("attention_sequences", sequences_kernel, shape, on, call.visibility.document_bounds(),
         call.T, static_cast<int>(graph.batch), where, static_cast<int*>(tokens),
         static_cast<std::int64_t*>(offsets));
}

}  // namespace reprise::kernels::cuda
