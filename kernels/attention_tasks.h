// The CPU side of attention: what attention.cc calls after the checks, and the arithmetic inside a
// tile.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "kernels/attention_sides.h"
#include "kernels/matmul_tile.h"

namespace reprise::kernels::cpu {

// From documents [B, T]: bounds [B, 2, T].
void document_bounds(const std::int64_t* documents, std::int64_t B, std::int64_t T,
                     std::int64_t* bounds);

// Sizes of tiles, the products of tiles, the layout of a thread's scratch.
class AttentionPlan {
 public:
  AttentionPlan(std::int64_t T, std::int64_t S, std::int64_t D, DType dtype,
                const AttentionOptions& options, bool whole, bool backward);
  std::int64_t slot_bytes() const { return slot_bytes_; }

  void forward(const AttentionCall& call, void* workspace, std::int64_t slots) const;
  void backward(const AttentionCall& call, void* workspace, std::int64_t slots) const;
  static std::int64_t tasks(std::int64_t B, std::int64_t T, std::int64_t H);

  // Queries and keys of a tile, and what its number of keys is a multiple of but at the end.
  std::int64_t queries, keys, grain;

  enum Kind { kScores, kOutputs, kScoresT, kKeySums, kQuerySums, kKinds };
  const TileProduct& product(Kind kind, std::int64_t m, std::int64_t w, bool first) const;
  // Key tiles for queries [first, last) of row b, in order.
  std::vector<Range> tiles(const Visibility& visibility, std::int64_t b, std::int64_t first,
                           std::int64_t last) const;

  struct Scratch {  // offsets in a slot
    std::int64_t q, k, v, dout, scores, products, probabilities, gradients, keep, bias, ranges,
        rows, sums, dk, dv, library;
  };
  const Scratch& scratch() const { return scratch_; }
  std::int64_t T, S, D;
  DType dtype;

 private:
  std::size_t index(Kind kind, std::int64_t m, std::int64_t w, bool first) const;
  std::int64_t make_products(bool whole, bool backward);
  void lay_out(bool dropout, bool backward, std::int64_t library_bytes);

  std::vector<std::shared_ptr<const TileProduct>> products_;
  Scratch scratch_{};
  std::int64_t slot_bytes_ = 0;
};

// -- arithmetic inside a tile (attention_cpu.cc) --

// Scores [rows, width] become probabilities, up to the factor exp(row_max - L): f32 in place, bf16
// into `probabilities`. Columns outside begin[row] .. end[row] become 0. What was summed before is
// scaled to the new maximum.
struct SoftmaxTile {
  float* scores;
  void* probabilities;
  DType dtype;
  std::int64_t rows, width;
  const std::int32_t *begin, *end;
  const float* bias;  // [width]: 0 or -inf; null when no key is padding
  const float* keep;  // [rows, width] dropout factors; null without
  float scale;
  float *row_max, *row_sum;
  float* sums;  // [rows, D]
  std::int64_t D;
  bool first;
};
void softmax_tile(const SoftmaxTile& tile);

// out = sums / row_sum, log_sum_exp = row_max + log(row_sum).
struct OutputRows {
  const float *sums, *row_max, *row_sum;
  std::int64_t rows, D;
  DType dtype;
  char* out;
  std::int64_t out_stride;  // bytes
  float* log_sum_exp;
};
void finish_rows(const OutputRows& rows);

// Transposed: rows are keys, columns are queries. From s and do . v to d p and scale e.
struct GradientTile {
  float *scores, *products;         // [rows, width]
  void *probabilities, *gradients;  // bf16 results; f32 is in place
  DType dtype;
  std::int64_t rows, width;
  const std::int32_t *begin, *end;   // visible columns of a row
  const float* keep;                 // [rows, width]
  const float *log_sum_exp, *delta;  // [width]
  float scale;
};
void gradient_tile(const GradientTile& tile);

// delta[i] = sum_d a[i, d] b[i, d]; strides in bytes.
void row_dots(DType dtype, const char* a, std::int64_t a_stride, const char* b,
              std::int64_t b_stride, std::int64_t rows, std::int64_t D, float* delta);

// to = factor sums (+ to).
void store_rows(const float* sums, std::int64_t rows, std::int64_t D, float factor, DType dtype,
                char* to, std::int64_t to_stride, bool accumulate);

// Dropout factors of queries x keys: [rows, columns] with either along the rows. `block` is that of
// the tile's first query at key 0, blocks_a_row apart from the next query's; first_key % 4 == 0.
struct KeepTile {
  std::uint64_t seed, block;
  std::int64_t blocks_a_row, first_key;
  std::int64_t queries, keys;
  double dropout;
  bool keys_as_rows;
  float* keep;
};
void keep_tile(const KeepTile& tile);

}  // namespace reprise::kernels::cpu
