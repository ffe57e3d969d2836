// What the tiled attention kernels are made of. A block works on a tile of scores, [rows, columns]:
// rows are its own (queries, or keys when gradients of keys are summed) and stay in shared memory,
// columns are streamed through it. A thread has 4 rows of scores and kEach columns, and of sums
// [rows, head] the same 4 rows and runs of 4 elements. The 16 threads of a row are half a warp.
#pragma once

#include "core/step_graph.h"
#include "kernels/attention_sides.h"
#include "kernels/device.cuh"
#include "kernels/matrix.cuh"
#include "kernels/philox.cuh"

namespace reprise::kernels::cuda {

inline constexpr int kAcross = 16;  // threads of a row
inline constexpr int kDown = 4;     // rows of a thread

__device__ __forceinline__ int least(std::int64_t a, int b) {
  return a < b ? static_cast<int>(a) : b;
}

// Heads of at most `width` elements.
template <int rows, int columns, int width>
struct AttentionTile {
  static constexpr int kRows = rows, kColumns = columns, kWidth = width;
  static constexpr int kThreads = rows / kDown * kAcross;
  static constexpr int kEach = columns / kAcross;
  static constexpr int kGroups = width / (4 * kAcross);  // runs of a thread in a row of sums
  // Floats between rows in shared memory: 16 threads at one element of 16 rows meet all banks.
  static constexpr int kStride = width + 4;
  static constexpr int kWeightStride = columns + 4;
  static_assert(kThreads % 32 == 0 && (kEach == 2 || kEach == 4) && kGroups > 0);

  // First row and column of this thread.
  __device__ static int row() { return static_cast<int>(threadIdx.x) / kAcross * kDown; }
  __device__ static int across() { return static_cast<int>(threadIdx.x) % kAcross; }
  __device__ static int column() { return across() * kEach; }
  // Where a column lies in shared memory. Threads have neighbouring columns, for one block of
  // random words each, but read rows that are apart by one, for the banks.
  __device__ static int slot(int column) { return column % kEach * kAcross + column / kEach; }
};

template <class Tile>
struct Scores {
  float at[kDown][Tile::kEach];
};
template <class Tile>
struct HeadSums {
  float at[kDown][Tile::kGroups * 4];
};

// A sequence of heads: [tokens, D] of one row of the batch.
template <class T>
struct HeadRows {
  char* at;
  std::int64_t token;  // bytes
  __device__ T* row(std::int64_t i) const { return reinterpret_cast<T*>(at + i * token); }
};
template <class T>
__device__ __forceinline__ HeadRows<T> head_rows(const AttentionHeads& heads, std::int64_t b,
                                                 std::int64_t head) {
  return {heads.at + b * heads.batch + head * heads.head, heads.token};
}

// Tokens first .. first + count - 1 to shared memory in f32; the rest of `rows` is 0, and so are
// elements from D to the next multiple of 8. kStreamed: in slots.
template <class Tile, int rows, bool kStreamed, class T>
__device__ __forceinline__ void load_heads(float* to, const HeadRows<T>& from, std::int64_t first,
                                           int count, int D) {
  constexpr int kLanes = Tile::kWidth / kRun, kAtOnce = Tile::kThreads / kLanes;
  static_assert(rows % kAtOnce == 0);
  const int column = static_cast<int>(threadIdx.x) % kLanes * kRun;
  const int left = D - column;
  if (left > 0) {
#pragma unroll
    for (int turn = 0; turn < rows / kAtOnce; ++turn) {
      const int row = turn * kAtOnce + static_cast<int>(threadIdx.x) / kLanes;
      Run run = {};
      if (row < count) {
        run = load_elements(from.row(first + row) + column, left < kRun ? left : kRun);
      }
      float* const at = to + (kStreamed ? Tile::slot(row) : row) * Tile::kStride + column;
      store_packet(at, Packet<float, 4>{{run.at[0], run.at[1], run.at[2], run.at[3]}});
      store_packet(at + 4, Packet<float, 4>{{run.at[4], run.at[5], run.at[6], run.at[7]}});
    }
  }
}

// Products of this thread's rows of `own` and its columns of `streamed`.
template <class Tile>
__device__ __forceinline__ Scores<Tile> multiply(const float* own, const float* streamed, int D) {
  const float* const x = own + Tile::row() * Tile::kStride;
  const float* const y = streamed + Tile::across() * Tile::kStride;
  Scores<Tile> scores = {};
#pragma unroll 1
  for (int d = 0; d < D; d += 4) {
    Packet<float, 4> a[kDown], b[Tile::kEach];
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
      a[r] = load_packet<4>(x + r * Tile::kStride + d);
    }
#pragma unroll
    for (int c = 0; c < Tile::kEach; ++c) {
      b[c] = load_packet<4>(y + c * kAcross * Tile::kStride + d);
    }
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kEach; ++c) {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          scores.at[r][c] += a[r].at[u] * b[c].at[u];
        }
      }
    }
  }
  return scores;
}

// sums += weights [rows, columns] times the streamed heads, of which `count` are not 0.
template <class Tile>
__device__ __forceinline__ void add_products(const float* weights, const float* streamed, int count,
                                             int D, HeadSums<Tile>& sums) {
  const float* const w = weights + Tile::row() * Tile::kWeightStride;
  const int element = Tile::across() * 4;
  const float* values = streamed + element;
  for (int j = 0; j < count; j += 4, values += 4 / Tile::kEach * Tile::kStride) {
    Packet<float, 4> of_row[kDown];
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
      of_row[r] = load_packet<4>(w + r * Tile::kWeightStride + j);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float* const from = values + Tile::slot(u) * Tile::kStride;  // column j + u
#pragma unroll
      for (int g = 0; g < Tile::kGroups; ++g) {
        if (element + g * 4 * kAcross < D) {
          const Packet<float, 4> value = load_packet<4>(from + g * 4 * kAcross);
#pragma unroll
          for (int r = 0; r < kDown; ++r) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sums.at[r][4 * g + e] += of_row[r].at[u] * value.at[e];
            }
          }
        }
      }
    }
  }
}

// A row's weights for the products, as the dtype would hold them.
template <class Tile, class T>
__device__ __forceinline__ void store_weights(float* weights, int r,
                                              const float (&values)[Tile::kEach]) {
  Packet<float, Tile::kEach> packet;
#pragma unroll
  for (int c = 0; c < Tile::kEach; ++c) {
    packet.at[c] = to_float(from_float<T>(values[c]));
  }
  store_packet(weights + (Tile::row() + r) * Tile::kWeightStride + Tile::column(), packet);
}

// to [D] = or += factor * row r of the sums, this thread's part.
template <class Tile, class T>
__device__ __forceinline__ void store_sums(T* to, int r, const HeadSums<Tile>& sums, float factor,
                                           int D, bool accumulate) {
#pragma unroll
  for (int g = 0; g < Tile::kGroups; ++g) {
    const int first = Tile::across() * 4 + g * 4 * kAcross;
    const bool whole =
        first + 4 <= D && reinterpret_cast<std::uintptr_t>(to + first) % sizeof(Packet<T, 4>) == 0;
    Packet<T, 4> packet = {};
    if (whole && accumulate) {
      packet = load_packet<4>(to + first);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (first + e < D) {
        const float before = accumulate ? to_float(whole ? packet.at[e] : to[first + e]) : 0.0f;
        packet.at[e] = from_float<T>(before + sums.at[r][4 * g + e] * factor);
        if (!whole) {
          to[first + e] = packet.at[e];
        }
      }
    }
    if (whole) {
      store_packet(to + first, packet);
    }
  }
}

// Over the 16 threads of a row; the same in each. All lanes take part.
__device__ __forceinline__ float row_total(float value) {
#pragma unroll
  for (int lane = kAcross / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lane);
  }
  return value;
}
__device__ __forceinline__ float row_highest(float value) {
#pragma unroll
  for (int lane = kAcross / 2; lane > 0; lane /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lane));
  }
  return value;
}

// The factors d_ij of dropout.
struct Keep {
  std::uint64_t seed, offset;
  const std::uint64_t* shift;
  std::int64_t blocks_a_row;
  float dropout, factor;

  __device__ __forceinline__ PhiloxWords words(std::int64_t row, std::int64_t key) const {
    const auto block = static_cast<std::uint64_t>(row * blocks_a_row + key / 4);
    return philox(seed, shifted(offset, shift) + block);
  }
  __device__ __forceinline__ float factor_of(std::uint32_t word) const {
    return static_cast<float>(word >> 8) * 0x1p-24f < dropout ? 0.0f : factor;
  }
};

template <class Tile>
struct Factors {
  float at[Tile::kEach];
};
// Those of a query's row, counted over [B, H, T], and this thread's columns from `key` on.
template <class Tile>
__device__ __forceinline__ Factors<Tile> keep_columns(const Keep& keep, std::int64_t row, int key) {
  Factors<Tile> factors;
#pragma unroll
  for (int c = 0; c < Tile::kEach; ++c) {
    factors.at[c] = 1.0f;
  }
  if (keep.dropout > 0.0f) {
    const PhiloxWords words = keep.words(row, key);
    const bool upper = Tile::kEach == 2 && key % 4 != 0;
#pragma unroll
    for (int c = 0; c < Tile::kEach; ++c) {
      // By a choice, not by an index: that would put the words into memory.
      factors.at[c] = keep.factor_of(upper ? words.at[(c + 2) % 4] : words.at[c]);
    }
  }
  return factors;
}
inline Keep keep_of(const AttentionCall& call) {
  return {call.options.seed,
          call.options.offset,
          draw_shift(),
          (call.S + 3) / 4,
          static_cast<float>(call.options.dropout),
          static_cast<float>(1.0 / (1.0 - call.options.dropout))};
}

// What a block does: tile `tile` of one head of a row of the batch. Blocks count tiles first.
struct BlockPlace {
  std::int64_t tile, head, b;
};
__device__ __forceinline__ BlockPlace block_place(std::int64_t tiles, std::int64_t heads) {
  const std::int64_t row = blockIdx.x / tiles;
  return {blockIdx.x - row * tiles, row % heads, row / heads};
}

// A tile of queries and the keys [begin, end) that any of them may see.
struct QueryTile {
  BlockPlace place;
  std::int64_t first;
  int count, begin, end;
};
template <class Tile>
__device__ __forceinline__ QueryTile query_tile(const AttentionCall& call) {
  const std::int64_t tiles = (call.T + Tile::kRows - 1) / Tile::kRows;
  const BlockPlace place = block_place(tiles, call.H);
  // The last queries first: with causality they take longest.
  const std::int64_t first = (tiles - 1 - place.tile) * Tile::kRows;
  const int count = least(call.T - first, Tile::kRows);
  // A block of random words belongs to 4 keys.
  return {place, first, count, static_cast<int>(call.visibility.keys(place.b, first).begin) / 4 * 4,
          static_cast<int>(call.visibility.keys(place.b, first + count - 1).end)};
}

inline std::int64_t tiles_of(std::int64_t tokens, std::int64_t rows) {
  return (tokens + rows - 1) / rows;
}

// ---- the kernels behind attention.cu ----

void tiled_attention(const AttentionCall& call, cudaStream_t stream);
void tiled_attention_backward(const AttentionCall& call, const float* deltas, cudaStream_t stream);

}  // namespace reprise::kernels::cuda
