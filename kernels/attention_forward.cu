#include "kernels/attention_tile.cuh"

namespace reprise::kernels::cuda {
namespace {

// The running softmax of this thread's rows; the 16 threads of a row hold the same.
struct RunningRows {
  int begin[kDown], end[kDown];  // keys that a row sees
  float highest[kDown], total[kDown];
};

__device__ __forceinline__ RunningRows start_rows(const AttentionCall& call, std::int64_t b,
                                                  std::int64_t first, int row) {
  RunningRows rows;
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t query = first + row + r;
    const Range seen = query < call.T ? call.visibility.keys(b, query) : Range{};
    rows.begin[r] = static_cast<int>(seen.begin);
    rows.end[r] = static_cast<int>(seen.end);
    rows.highest[r] = -INFINITY;
    rows.total[r] = 0.0f;
  }
  return rows;
}

// Scores of keys from `key` on become weights; sums of before are scaled to the new maximum.
template <class T, class Tile>
__device__ __forceinline__ void softmax(const AttentionCall& call, const Keep& keep,
                                        const BlockPlace& place, std::int64_t first, int key,
                                        const Scores<Tile>& scores, RunningRows& rows,
                                        HeadSums<Tile>& sums, float* weights) {
  const auto scale = static_cast<float>(call.options.scale);
  const int own = key + Tile::column();
  bool token[Tile::kEach];
#pragma unroll
  for (int c = 0; c < Tile::kEach; ++c) {
    token[c] =
        call.mask == nullptr || (own + c < call.S && call.mask[place.b * call.S + own + c] != 0);
  }
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    float s[Tile::kEach];
    float highest = -INFINITY;
#pragma unroll
    for (int c = 0; c < Tile::kEach; ++c) {
      const bool seen = token[c] && own + c >= rows.begin[r] && own + c < rows.end[r];
      s[c] = seen ? scores.at[r][c] * scale : -INFINITY;
      highest = fmaxf(highest, s[c]);
    }
    const float before = rows.highest[r];
    highest = fmaxf(before, row_highest(highest));
    const float shift = highest == -INFINITY ? 0.0f : highest;  // nothing seen so far
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < Tile::kEach; ++c) {
      s[c] = probability(s[c] - shift);
      total += s[c];
    }
    const float rescale = probability(before - shift);
    rows.highest[r] = highest;
    rows.total[r] = rows.total[r] * rescale + row_total(total);
#pragma unroll
    for (int e = 0; e < Tile::kGroups * 4; ++e) {
      sums.at[r][e] *= rescale;
    }
    const std::int64_t row = (place.b * call.H + place.head) * call.T + first + Tile::row() + r;
    const Factors<Tile> kept = keep_columns<Tile>(keep, row, own);
#pragma unroll
    for (int c = 0; c < Tile::kEach; ++c) {
      s[c] *= kept.at[c];
    }
    store_weights<Tile, T>(weights, r, s);
  }
}

// A block takes a tile of queries of one head, and walks over the keys that they see.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kWidth <= 64 ? 2 : 1)
    forward_kernel(const __grid_constant__ AttentionCall call, const Keep keep) {
  float* const q = dynamic_shared<float>();
  float* const streamed = q + Tile::kRows * Tile::kStride;
  float* const weights = streamed + Tile::kColumns * Tile::kStride;
  const int D = static_cast<int>(call.D);
  const auto [place, first, count, begin, end] = query_tile<Tile>(call);
  const std::int64_t group = place.head / (call.H / call.K);
  const HeadRows<T> keys = head_rows<T>(call.k, place.b, group);
  const HeadRows<T> values = head_rows<T>(call.v, place.b, group);

  load_heads<Tile, Tile::kRows, false>(q, head_rows<T>(call.q, place.b, place.head), first, count,
                                       D);
  RunningRows rows = start_rows(call, place.b, first, Tile::row());
  HeadSums<Tile> sums = {};
  const bool works = Tile::row() < count;
  for (int key = begin; key < end; key += Tile::kColumns) {
    const int width = least(end - key, Tile::kColumns);
    __syncthreads();  // the values of before have been read
    load_heads<Tile, Tile::kColumns, true>(streamed, keys, key, width, D);
    __syncthreads();
    Scores<Tile> scores = {};
    if (works) {
      scores = multiply<Tile>(q, streamed, D);
    }
    softmax<T, Tile>(call, keep, place, first, key, scores, rows, sums, weights);
    __syncthreads();  // the keys have been read
    load_heads<Tile, Tile::kColumns, true>(streamed, values, key, width, D);
    __syncthreads();
    if (works) {
      add_products<Tile>(weights, streamed, width, D, sums);
    }
  }

  const HeadRows<T> out = head_rows<T>(call.out, place.b, place.head);
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t query = first + Tile::row() + r;
    if (query < call.T) {
      const bool nothing = rows.total[r] == 0.0f;
      store_sums<Tile>(out.row(query), r, sums, nothing ? 0.0f : 1.0f / rows.total[r], D, false);
      if (Tile::across() == 0) {
        call.log_sum_exp[(place.b * call.H + place.head) * call.T + query] =
            nothing ? -INFINITY : rows.highest[r] + logf(rows.total[r]);
      }
    }
  }
}

template <class T, int rows, int columns, int width>
void start(const AttentionCall& call, cudaStream_t stream) {
  using Tile = AttentionTile<rows, columns, width>;
  constexpr std::size_t kFloats = (rows + columns) * Tile::kStride + rows * Tile::kWeightStride;
  launch("attention", forward_kernel<T, Tile>,
         {dim3(static_cast<unsigned>(call.B * call.H * tiles_of(call.T, rows))),
          dim3(Tile::kThreads), kFloats * sizeof(float)},
         stream, call, keep_of(call));
}

template <class T>
void start_for_width(const AttentionCall& call, cudaStream_t stream) {
  if (call.D <= 64) {
    start<T, 64, 64, 64>(call, stream);
  } else if (call.D <= 128) {
    start<T, 64, 64, 128>(call, stream);
  } else {
    start<T, 32, 32, 256>(call, stream);
  }
}

}  // namespace

void tiled_attention(const AttentionCall& call, cudaStream_t stream) {
  call.dtype == DType::f32 ? start_for_width<float>(call, stream)
                           : start_for_width<__nv_bfloat16>(call, stream);
}

}  // namespace reprise::kernels::cuda
