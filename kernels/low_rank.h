// The products of a low-rank adapter, beside a frozen layer y = x W^T (nn/lora.h).
//
//   low_rank:      u = s drop(x) A^T          du -> dx = drop'(s du A),  dA = s du^T drop(x)
//   add_low_rank:  z = y + u B^T              dz -> dy = dz, du = dz B,  dB = dz^T u
//   merged_norms:  v[o] = 1 / |W + s B A|_o   the length of row o; no gradient
//
// drop() is dropout as in kernels/dropout.h, in the arithmetic of A; its mask is made again in
// backward, so that no dropped copy of x is kept.
//
// Shapes    x and dx [.., I], A [R, I], u [.., R], B [O, R], y and z [.., O]; W [O, I], or [I, O]
//           when in_out; v [O]. Leading dimensions are rows; any size may be 0.
// Types     x, y and z f32 or bf16. A, B and u all f32, or all bf16 where x and y are: an f32
//           adapter widens x and dz, on the CPU in a workspace of 512 rows. W and gradients of A
//           and B f32 or bf16, v f32. Sums are in f32 and rounded once.
// Layout    x, dz, W rows of unit stride; the others contiguous.
// Aliasing  z may be y. Otherwise outputs must not overlap inputs.
// Errors    other dtypes, shapes, devices or strides.
// Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021; Liu et al., "DoRA:
// weight-decomposed low-rank adaptation", 2024 (the norms).
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

struct LowRankOptions {
  double scale = 1;        // s
  double probability = 0;  // of dropout; 0: none, and the two below do not matter
  std::uint64_t seed = 0, offset = 0;
};

// Where a gradient goes; an undefined tensor: it is not wanted.
struct LowRankGradient {
  Tensor tensor;
  bool accumulate = false;
};

void low_rank(const Tensor& x, const Tensor& a, const LowRankOptions& options, const Tensor& u);
void low_rank_backward(const Tensor& du, const Tensor& x, const Tensor& a,
                       const LowRankOptions& options, const LowRankGradient& dx,
                       const LowRankGradient& da);

void add_low_rank(const Tensor& y, const Tensor& u, const Tensor& b, const Tensor& z);
void add_low_rank_backward(const Tensor& dz, const Tensor& u, const Tensor& b,
                           const LowRankGradient& du, const LowRankGradient& db);

void merged_norms(const Tensor& w, bool in_out, const Tensor& a, const Tensor& b, double scale,
                  const Tensor& v);

}  // namespace reprise::kernels
