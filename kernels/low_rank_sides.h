// The sides of low_rank.h.
#pragma once

#include "kernels/dropout_sides.h"
#include "kernels/matrix_sides.h"

namespace reprise {
class Tensor;
}

namespace reprise::kernels {

struct LowRankOptions;
struct LowRankGradient;

// Made of the library's products, in a workspace of rows. Arguments are those of the kernels of
// the same name, checked; on meta only the workspace is taken. On the CPU all of them; on a cuda
// device those whose sums are long (over I, O or the rows).
namespace products {
void low_rank(const Tensor& x, const Tensor& a, const LowRankOptions& options, const Tensor& u);
void low_rank_backward(const Tensor& du, const Tensor& x, const Tensor& a,
                       const LowRankOptions& options, const LowRankGradient& dx,
                       const LowRankGradient& da);
void add_low_rank(const Tensor& y, const Tensor& u, const Tensor& b, const Tensor& z);
void add_low_rank_backward(const Tensor& dz, const Tensor& u, const Tensor& b,
                           const LowRankGradient& du, const LowRankGradient& db);
void merged_norms(const Tensor& w, bool in_out, const Tensor& a, const Tensor& b, double scale,
                  const Tensor& v);
}  // namespace products

// An operand of a sum over k: its rows are those of the result (or its columns), or those of k.
struct LowRankFactor {
  Matrix at;
  bool rows_are_k = false;
};

// to [M, N] (+)= base + drop(scale * sum over k of left(m, k) right(k, n)); in f32, rounded once.
struct LowRankProduct {
  std::int64_t m = 0, n = 0, k = 0;
  LowRankFactor left, right;
  Matrix to;
  Matrix base{};  // may be `to`, or absent
  float scale = 1;
  DropoutMask mask{};
  bool drop_result = false;
  bool accumulate = false;
};

// In order of the stream. For sums over a rank: one pass over what is large, nothing is widened or
// dropped but in registers.
namespace cuda {
void low_rank_product(const LowRankProduct& product, void* stream);
// v[m] = 1 / the length of row m of w + the product, whose `to` and `base` do not matter. w is
// [M, N], or [N, M] when in_out.
void merged_norms(const Matrix& w, bool in_out, const LowRankProduct& product, float* v,
                  void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
