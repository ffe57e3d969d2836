// Chooses the kernels that run: the library's (attention_fused.h), or the tiled ones of
// attention_forward.cu and attention_backward.cu; and has the small ones beside them.
#include "kernels/attention_fused.h"
#include "kernels/attention_tile.cuh"

namespace reprise::kernels::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_of(std::int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

// How many of the row's places are below `document`, or at most it. Whatever the numbers, it is
// within the row.
__device__ __forceinline__ std::int64_t places_before(const std::int64_t* row, std::int64_t T,
                                                      std::int64_t document, bool or_equal) {
  std::int64_t low = 0, high = T;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (row[middle] < document || (or_equal && row[middle] == document)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const std::int64_t* documents, std::int64_t count, std::int64_t T,
                  std::int64_t* bounds) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) {
    const std::int64_t b = at / T, i = at - b * T;
    const std::int64_t* const row = documents + b * T;
    std::int64_t* const to = bounds + 2 * b * T;
    to[i] = places_before(row, T, row[i], false);
    to[T + i] = places_before(row, T, row[i], true);
  }
}

struct Seen {
  std::int64_t decrease, padding;  // the first places where there is something wrong
  std::int64_t begins;             // of documents
};

__device__ __forceinline__ std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

__device__ __forceinline__ void look(const VisibilityCheck& check, std::int64_t at, Seen& seen) {
  if (check.documents != nullptr && at < check.B * check.T) {
    const bool first = at % check.T == 0;
    const std::int64_t number = check.documents[at];
    const std::int64_t before = first ? number : check.documents[at - 1];
    seen.decrease = number < before ? smaller(seen.decrease, at) : seen.decrease;
    seen.begins += first || number != before ? 1 : 0;
  }
  if (check.mask != nullptr && at < check.B * check.S) {
    const bool token = check.mask[at] != 0;
    const bool wrong = at % check.S == 0 ? !token : token && check.mask[at - 1] == 0;
    seen.padding = wrong ? smaller(seen.padding, at) : seen.padding;
  }
}

// One block, so that which place is named does not depend on timing.
__global__ void __launch_bounds__(kThreads)
    check_kernel(const __grid_constant__ VisibilityCheck check, DeviceFault* word) {
  __shared__ Seen of_thread[kThreads];
  const std::int64_t none = INT64_MAX, places = check.B * (check.T < check.S ? check.S : check.T);
  Seen seen{none, none, 0};
  for (std::int64_t at = threadIdx.x; at < places; at += kThreads) {
    look(check, at, seen);
  }
  of_thread[threadIdx.x] = seen;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      const Seen other = of_thread[threadIdx.x + half];
      Seen& own = of_thread[threadIdx.x];
      own = {smaller(own.decrease, other.decrease), smaller(own.padding, other.padding),
             own.begins + other.begins};
    }
  }
  if (threadIdx.x == 0 && word->site == 0) {
    const auto [decrease, padding, begins] = of_thread[0];
    if (decrease != none) {
      *word = {check.decreases, decrease, check.documents[decrease], check.T,
               check.documents[decrease - 1]};
    } else if (padding != none) {
      *word = {check.padding, padding, check.mask[padding], check.S, 0};
    } else if (check.most_documents > 0 && begins > check.most_documents) {
      *word = {check.many, 0, begins, check.most_documents, 0};
    }
  }
}

// do . o of each query and head: a warp each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    deltas_kernel(const __grid_constant__ AttentionCall call, float* deltas) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row < call.B * call.H * call.T) {  // the same for a warp
    const std::int64_t head = row / call.T, i = row - head * call.T;
    const std::int64_t b = head / call.H, h = head - b * call.H;
    const T* const x = head_rows<T>(call.dout, b, h).row(i);
    const T* const y = head_rows<T>(call.out, b, h).row(i);
    float sum = 0.0f;
    for (std::int64_t d = threadIdx.x % 32; d < call.D; d += 32) {
      sum += to_float(x[d]) * to_float(y[d]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      deltas[row] = sum;
    }
  }
}

}  // namespace

void check_visibility(const VisibilityCheck& check, DeviceFault* word, void* stream) {
  launch("attention_check", check_kernel, {dim3(1), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), check, word);
}

void document_bounds(const std::int64_t* documents, std::int64_t B, std::int64_t T,
                     std::int64_t* bounds, void* stream) {
  launch("attention_document_bounds", bounds_kernel, {dim3(blocks_of(B * T)), dim3(kThreads)},
         static_cast<cudaStream_t>(stream), documents, B * T, T, bounds);
}

void attention(const AttentionCall& call, const std::optional<FusedCall>& fused, void* workspace,
               void* stream) {
  if (fused_attention(call, fused, workspace, stream)) {
    return;
  }
  tiled_attention(call, static_cast<cudaStream_t>(stream));
}

void attention_backward(const AttentionCall& call, float* deltas,
                        const std::optional<FusedCall>& fused, void* workspace, void* stream) {
  if (fused_attention(call, fused, workspace, stream)) {
    return;
  }
  const auto on = static_cast<cudaStream_t>(stream);
  launch("attention_deltas",
         call.dtype == DType::f32 ? deltas_kernel<float> : deltas_kernel<__nv_bfloat16>,
         {dim3(blocks_of(call.B * call.H * call.T * 32)), dim3(kThreads)}, on, call, deltas);
  tiled_attention_backward(call, deltas, on);
}

}  // namespace reprise::kernels::cuda
