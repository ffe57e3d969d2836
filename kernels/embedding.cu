#include "kernels/embedding_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Lookup {
  EmbeddingCall call;
  __device__ void operator()(std::int64_t i, std::int64_t column, int count) const {
    store_run(call.y, i, column, count, load_run(call.table, call.ids[i], column, count));
  }
};

struct Zero {
  Matrix to;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    store_run(to, row, column, count, Run{});
  }
};

constexpr int kThreads = 256;

// order = the positions sorted by (id, position). A thread finds the place of one by comparing it
// with all: quadratic, but without an exchange between threads that could depend on timing, and for
// the tokens of a step a fraction of what their rows cost to add.
__global__ void __launch_bounds__(kThreads) order_kernel(EmbeddingGradient call) {
  __shared__ std::int64_t ids[kThreads];
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t id = i < call.count ? call.ids[i] : 0;
  std::int64_t place = 0;
  for (std::int64_t first = 0; first < call.count; first += kThreads) {
    const std::int64_t left = call.count - first;
    if (threadIdx.x < left) {
      ids[threadIdx.x] = call.ids[first + threadIdx.x];
    }
    __syncthreads();
    const int count = left < kThreads ? static_cast<int>(left) : kThreads;
    for (int j = 0; j < count; ++j) {
      place += ids[j] < id || (ids[j] == id && first + j < i) ? 1 : 0;
    }
    __syncthreads();
  }
  if (i < call.count) {
    call.order[place] = i;
  }
}

// Where a new id begins in the order, its rows of dy are added, one after the other.
struct AddRows {
  EmbeddingGradient call;
  __device__ void operator()(std::int64_t place, std::int64_t column, int count) const {
    const std::int64_t id = call.ids[call.order[place]];
    if (id == call.padding || (place > 0 && call.ids[call.order[place - 1]] == id)) {
      return;
    }
    Run sum = {};
    for (std::int64_t k = place; k < call.count; ++k) {
      const std::int64_t i = call.order[k];
      if (call.ids[i] != id) {
        break;
      }
      const Run row = load_run(call.dy, i, column, count);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        sum.at[e] += row.at[e];
      }
    }
    store_run(call.dtable, id, column, count, sum, call.accumulate);
  }
};

}  // namespace

void embedding(const EmbeddingCall& call, void* stream) {
  launch_runs("embedding", Lookup{call}, {call.count, call.width}, stream);
}

void embedding_gradient(const EmbeddingGradient& call, void* stream) {
  if (!call.accumulate) {
    launch_runs("embedding_zero", Zero{call.dtable}, {call.rows, call.width}, stream);
  }
  const std::int64_t blocks = (call.count + kThreads - 1) / kThreads;
  if (blocks > 0) {
    launch("embedding_order", order_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
           static_cast<cudaStream_t>(stream), call);
    launch_runs("embedding_gradient", AddRows{call}, {call.count, call.width}, stream);
  }
}

}  // namespace reprise::kernels::cuda
