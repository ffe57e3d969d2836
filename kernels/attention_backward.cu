#include "kernels/attention_tile.cuh"

namespace reprise::kernels::cuda {
namespace {

struct BackwardCall {
  AttentionCall call;
  Keep keep;
  const float* deltas;  // [B, H, T]
};

// What makes p and e of a score s and of do . v.
struct Pair {
  float p, e;
};
__device__ __forceinline__ Pair gradient_of(bool seen, float score, float product, float keep,
                                            float log_sum_exp, float delta, float scale) {
  const float p = probability(score * scale - log_sum_exp);
  const float e = p * (product * keep - delta) * scale;
  return seen ? Pair{p * keep, e} : Pair{0.0f, 0.0f};
}

// ---- dq: a block takes a tile of queries and walks over the keys that they see -----------------

template <class Tile>
struct QueryRows {
  int begin[kDown], end[kDown];  // keys that a row sees
  float log_sum_exp[kDown], delta[kDown];
};

template <class Tile>
__device__ __forceinline__ QueryRows<Tile> query_rows(const BackwardCall& with, std::int64_t b,
                                                      std::int64_t head, std::int64_t first) {
  const AttentionCall& call = with.call;
  QueryRows<Tile> rows;
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t query = first + Tile::row() + r;
    const std::int64_t at = (b * call.H + head) * call.T + query;
    const bool there = query < call.T;
    const Range seen = there ? call.visibility.keys(b, query) : Range{};
    rows.begin[r] = static_cast<int>(seen.begin);
    rows.end[r] = static_cast<int>(seen.end);
    rows.log_sum_exp[r] = there ? call.log_sum_exp[at] : 0.0f;
    rows.delta[r] = there ? with.deltas[at] : 0.0f;
  }
  return rows;
}

// e of this thread's queries and of its keys from `own` on.
template <class T, class Tile>
__device__ __forceinline__ void query_weights(const BackwardCall& with, const BlockPlace& place,
                                              std::int64_t first, int own,
                                              const QueryRows<Tile>& rows,
                                              const Scores<Tile>& scores,
                                              const Scores<Tile>& products, float* weights) {
  const AttentionCall& call = with.call;
  const auto scale = static_cast<float>(call.options.scale);
  bool token[Tile::kEach];
#pragma unroll
  for (int c = 0; c < Tile::kEach; ++c) {
    token[c] =
        call.mask == nullptr || (own + c < call.S && call.mask[place.b * call.S + own + c] != 0);
  }
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t row = (place.b * call.H + place.head) * call.T + first + Tile::row() + r;
    const Factors<Tile> kept = keep_columns<Tile>(with.keep, row, own);
    float e[Tile::kEach];
#pragma unroll
    for (int c = 0; c < Tile::kEach; ++c) {
      const bool seen = token[c] && own + c >= rows.begin[r] && own + c < rows.end[r];
      e[c] = gradient_of(seen, scores.at[r][c], products.at[r][c], kept.at[c], rows.log_sum_exp[r],
                         rows.delta[r], scale)
                 .e;
    }
    store_weights<Tile, T>(weights, r, e);
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kWidth <= 64 ? 2 : 1)
    query_gradient_kernel(const __grid_constant__ BackwardCall with) {
  const AttentionCall& call = with.call;
  float* const q = dynamic_shared<float>();
  float* const dout = q + Tile::kRows * Tile::kStride;
  float* const k = dout + Tile::kRows * Tile::kStride;
  float* const v = k + Tile::kColumns * Tile::kStride;
  float* const weights = v + Tile::kColumns * Tile::kStride;
  const int D = static_cast<int>(call.D);
  const auto [place, first, count, begin, end] = query_tile<Tile>(call);
  const std::int64_t group = place.head / (call.H / call.K);
  const HeadRows<T> keys = head_rows<T>(call.k, place.b, group);
  const HeadRows<T> values = head_rows<T>(call.v, place.b, group);

  load_heads<Tile, Tile::kRows, false>(q, head_rows<T>(call.q, place.b, place.head), first, count,
                                       D);
  load_heads<Tile, Tile::kRows, false>(dout, head_rows<T>(call.dout, place.b, place.head), first,
                                       count, D);
  const QueryRows<Tile> rows = query_rows<Tile>(with, place.b, place.head, first);
  HeadSums<Tile> sums = {};
  const bool works = Tile::row() < count;
  for (int key = begin; key < end; key += Tile::kColumns) {
    const int width = least(end - key, Tile::kColumns);
    __syncthreads();  // the keys of before have been read
    load_heads<Tile, Tile::kColumns, true>(k, keys, key, width, D);
    load_heads<Tile, Tile::kColumns, true>(v, values, key, width, D);
    __syncthreads();
    if (works) {
      const Scores<Tile> scores = multiply<Tile>(q, k, D);
      const Scores<Tile> products = multiply<Tile>(dout, v, D);
      query_weights<T, Tile>(with, place, first, key + Tile::column(), rows, scores, products,
                             weights);
    }
    __syncwarp();  // a row's weights stay within half a warp
    if (works) {
      add_products<Tile>(weights, k, width, D, sums);
    }
  }

  const HeadRows<T> dq = head_rows<T>(call.dq, place.b, place.head);
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t query = first + Tile::row() + r;
    if (query < call.T) {
      store_sums<Tile>(dq.row(query), r, sums, 1.0f, D, call.accumulate_q);
    }
  }
}

// ---- dk, dv: a block takes a tile of keys and walks over the queries of all heads of the group
// ---

struct KeyRows {
  int begin[kDown], end[kDown];  // queries that see a row
};

template <class Tile>
__device__ __forceinline__ KeyRows key_rows(const AttentionCall& call, std::int64_t b,
                                            std::int64_t first) {
  KeyRows rows;
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t key = first + Tile::row() + r;
    const bool there = key < call.S && (call.mask == nullptr || call.mask[b * call.S + key] != 0);
    const Range seen = there ? call.visibility.queries(b, key) : Range{};
    rows.begin[r] = static_cast<int>(seen.begin);
    rows.end[r] = static_cast<int>(seen.end);
  }
  return rows;
}

// p and e of this thread's keys and of its queries from `own` on, transposed: over the scores and
// the products.
template <class Tile>
__device__ __forceinline__ void key_weights(const BackwardCall& with, std::int64_t row_of_head,
                                            std::int64_t first, int own, const KeyRows& rows,
                                            Scores<Tile>& scores, Scores<Tile>& products) {
  const AttentionCall& call = with.call;
  const auto scale = static_cast<float>(call.options.scale);
#pragma unroll
  for (int c = 0; c < Tile::kEach; ++c) {
    const bool there = own + c < call.T;
    const std::int64_t row = row_of_head + own + c;
    const float log_sum_exp = there ? call.log_sum_exp[row] : 0.0f;
    const float delta = there ? with.deltas[row] : 0.0f;
    float keep[kDown] = {1.0f, 1.0f, 1.0f, 1.0f};
    if (with.keep.dropout > 0.0f) {
      const PhiloxWords words = with.keep.words(row, first + Tile::row());
#pragma unroll
      for (int r = 0; r < kDown; ++r) {
        keep[r] = with.keep.factor_of(words.at[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
      const bool seen = own + c >= rows.begin[r] && own + c < rows.end[r];
      const Pair pair =
          gradient_of(seen, scores.at[r][c], products.at[r][c], keep[r], log_sum_exp, delta, scale);
      scores.at[r][c] = pair.p;
      products.at[r][c] = pair.e;
    }
  }
}

// sums += the weights of these scores times the streamed heads. Weights lie in shared memory
// between; the threads of a row are in one warp.
template <class T, class Tile>
__device__ __forceinline__ void add_weighted(const Scores<Tile>& scores, const float* streamed,
                                             int width, int D, bool works, float* weights,
                                             HeadSums<Tile>& sums) {
  __syncwarp();  // the weights of before have been read
  if (works) {
#pragma unroll
    for (int r = 0; r < kDown; ++r) {
      store_weights<Tile, T>(weights, r, scores.at[r]);
    }
  }
  __syncwarp();
  if (works) {
    add_products<Tile>(weights, streamed, width, D, sums);
  }
}

// One block a multiprocessor, said aloud: else registers are spilled for a second.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    key_gradient_kernel(const __grid_constant__ BackwardCall with) {
  const AttentionCall& call = with.call;
  float* const k = dynamic_shared<float>();
  float* const v = k + Tile::kRows * Tile::kStride;
  float* const q = v + Tile::kRows * Tile::kStride;
  float* const dout = q + Tile::kColumns * Tile::kStride;
  float* const weights = dout + Tile::kColumns * Tile::kStride;
  const int D = static_cast<int>(call.D);
  const BlockPlace place = block_place((call.S + Tile::kRows - 1) / Tile::kRows, call.K);
  const std::int64_t first = place.tile * Tile::kRows, group = call.H / call.K;
  const int count = least(call.S - first, Tile::kRows);

  load_heads<Tile, Tile::kRows, false>(k, head_rows<T>(call.k, place.b, place.head), first, count,
                                       D);
  load_heads<Tile, Tile::kRows, false>(v, head_rows<T>(call.v, place.b, place.head), first, count,
                                       D);
  const KeyRows rows = key_rows<Tile>(call, place.b, first);
  HeadSums<Tile> dk_sums = {}, dv_sums = {};
  const int begin = static_cast<int>(call.visibility.queries(place.b, first).begin);
  const int end = static_cast<int>(call.visibility.queries(place.b, first + count - 1).end);
  const bool works = Tile::row() < count;
  for (std::int64_t head = place.head * group; head < (place.head + 1) * group; ++head) {
    const HeadRows<T> queries = head_rows<T>(call.q, place.b, head);
    const HeadRows<T> gradients = head_rows<T>(call.dout, place.b, head);
    for (int query = begin; query < end; query += Tile::kColumns) {
      const int width = least(end - query, Tile::kColumns);
      __syncthreads();  // the queries of before have been read
      load_heads<Tile, Tile::kColumns, true>(q, queries, query, width, D);
      load_heads<Tile, Tile::kColumns, true>(dout, gradients, query, width, D);
      __syncthreads();
      Scores<Tile> scores = {}, products = {};
      if (works) {
        scores = multiply<Tile>(k, q, D);
        products = multiply<Tile>(v, dout, D);
        key_weights<Tile>(with, (place.b * call.H + head) * call.T, first, query + Tile::column(),
                          rows, scores, products);
      }
      if (call.dv.at != nullptr) {
        add_weighted<T, Tile>(scores, dout, width, D, works, weights, dv_sums);
      }
      if (call.dk.at != nullptr) {
        add_weighted<T, Tile>(products, q, width, D, works, weights, dk_sums);
      }
    }
  }

  const HeadRows<T> dk = head_rows<T>(call.dk, place.b, place.head);
  const HeadRows<T> dv = head_rows<T>(call.dv, place.b, place.head);
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const std::int64_t key = first + Tile::row() + r;
    if (key < call.S && call.dk.at != nullptr) {
      store_sums<Tile>(dk.row(key), r, dk_sums, 1.0f, D, call.accumulate_k);
    }
    if (key < call.S && call.dv.at != nullptr) {
      store_sums<Tile>(dv.row(key), r, dv_sums, 1.0f, D, call.accumulate_v);
    }
  }
}

template <class T, int rows, int columns, int width>
void start(const BackwardCall& with, cudaStream_t stream) {
  using Tile = AttentionTile<rows, columns, width>;
  constexpr std::size_t kBytes =
      (2 * (rows + columns) * Tile::kStride + rows * Tile::kWeightStride) * sizeof(float);
  const AttentionCall& call = with.call;
  if (call.dq.at != nullptr) {
    launch("attention_query_gradient", query_gradient_kernel<T, Tile>,
           {dim3(static_cast<unsigned>(call.B * call.H * tiles_of(call.T, rows))),
            dim3(Tile::kThreads), kBytes},
           stream, with);
  }
  if (call.dk.at != nullptr || call.dv.at != nullptr) {
    launch("attention_key_gradient", key_gradient_kernel<T, Tile>,
           {dim3(static_cast<unsigned>(call.B * call.K * tiles_of(call.S, rows))),
            dim3(Tile::kThreads), kBytes},
           stream, with);
  }
}

template <class T>
void start_for_width(const BackwardCall& with, cudaStream_t stream) {
  if (with.call.D <= 64) {
    start<T, 64, 64, 64>(with, stream);
  } else if (with.call.D <= 128) {
    start<T, 64, 64, 128>(with, stream);
  } else {
    start<T, 32, 32, 256>(with, stream);
  }
}

}  // namespace

void tiled_attention_backward(const AttentionCall& call, const float* deltas, cudaStream_t stream) {
  const BackwardCall with{call, keep_of(call), deltas};
  call.dtype == DType::f32 ? start_for_width<float>(with, stream)
                           : start_for_width<__nv_bfloat16>(with, stream);
}

}  // namespace reprise::kernels::cuda
