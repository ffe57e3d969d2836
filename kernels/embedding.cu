#include "kernels/embedding_sides.h"
#include "kernels/matrix.cuh"

namespace reprise::kernels::cuda {
namespace {

struct Lookup {
  EmbeddingCall call;
  __device__ void operator()(std::int64_t i, std::int64_t column, int count) const {
    const std::int64_t id = call.ids[i];
    const bool wrong = id < 0 || id >= call.rows;
    store_run(call.y, i, column, count, wrong ? Run{} : load_run(call.table, id, column, count));
  }
};

struct Zero {
  Matrix to;
  __device__ void operator()(std::int64_t row, std::int64_t column, int count) const {
    store_run(to, row, column, count, Run{});
  }
};

// The sorted ids, and what of their runs lies in a chunk.
struct Runs {
  EmbeddingGradient call;
  SortedIds sorted;
  Matrix partials;  // [2, chunks, width]
  std::int64_t chunks;

  __device__ __forceinline__ std::int64_t begin(std::int64_t chunk) const {
    return chunk * kSumChunk;
  }
  __device__ __forceinline__ std::int64_t end(std::int64_t chunk) const {
    const std::int64_t full = begin(chunk + 1);
    return full < call.count ? full : call.count;
  }
  // Whether the run at `place` is that of the place before.
  __device__ __forceinline__ bool goes_on(std::int64_t place) const {
    return place > 0 && place < call.count && sorted.keys[place - 1] == sorted.keys[place];
  }
  // Rows of the partial sums: of a run that an earlier chunk began, and of one that begins here and
  // goes on in the next.
  __device__ __forceinline__ std::int64_t continued(std::int64_t chunk) const { return chunk; }
  __device__ __forceinline__ std::int64_t begun(std::int64_t chunk) const { return chunks + chunk; }
};

__device__ __forceinline__ void add(Run& sum, const Run& x) {
#pragma unroll
  for (int e = 0; e < kRun; ++e) {
    sum.at[e] += x.at[e];
  }
}

// The rows of dy of a chunk, one after the other. A run that lies within the chunk is done.
struct AddChunk {
  Runs runs;
  __device__ void operator()(std::int64_t chunk, std::int64_t column, int count) const {
    const EmbeddingGradient& call = runs.call;
    const std::int64_t end = runs.end(chunk);
    std::int64_t place = runs.begin(chunk);
    bool began_before = runs.goes_on(place);
    while (place < end) {
      const std::int64_t id = runs.sorted.keys[place];
      if (id >= call.rows) {
        return;  // none of these has a gradient
      }
      Run sum = {};
      bool same = true;
      for (; place < end && same; ++place) {
        add(sum, load_run(call.dy, runs.sorted.places[place], column, count));
        same = runs.goes_on(place + 1);
      }
      if (began_before) {
        store_run(runs.partials, runs.continued(chunk), column, count, sum);
      } else if (same) {  // goes on in the next chunk
        store_run(runs.partials, runs.begun(chunk), column, count, sum);
      } else {
        store_run(call.dtable, id, column, count, sum, call.accumulate);
      }
      began_before = false;
    }
  }
};

// Of a run that begins in a chunk and ends in a later one, the sums in order.
struct AddPartials {
  Runs runs;
  __device__ void operator()(std::int64_t chunk, std::int64_t column, int count) const {
    const std::int64_t last = runs.end(chunk) - 1, id = runs.sorted.keys[last];
    const bool began_before =
        runs.goes_on(runs.begin(chunk)) && runs.sorted.keys[runs.begin(chunk)] == id;
    if (id >= runs.call.rows || began_before || !runs.goes_on(last + 1)) {
      return;
    }
    Run sum = load_run(runs.partials, runs.begun(chunk), column, count);
    for (std::int64_t next = chunk + 1;
         next < runs.chunks && runs.sorted.keys[runs.begin(next)] == id; ++next) {
      add(sum, load_run(runs.partials, runs.continued(next), column, count));
    }
    store_run(runs.call.dtable, id, column, count, sum, runs.call.accumulate);
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
  if (call.count == 0 || call.width == 0) {
    return;
  }
  const EmbeddingWorkspace workspace(call.count, call.width);
  const Matrix partials{static_cast<char*>(call.workspace) + workspace.partials, DType::f32,
                        call.width};
  const Runs runs{call, sort_ids(call, workspace, stream), partials, workspace.chunks};
  launch_runs("embedding_gradient", AddChunk{runs}, {workspace.chunks, call.width}, stream);
  launch_runs("embedding_partials", AddPartials{runs}, {workspace.chunks, call.width}, stream);
}

}  // namespace reprise::kernels::cuda
