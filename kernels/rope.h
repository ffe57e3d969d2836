// Rotary position embedding of [B, T, H, D]: pairs of elements of a head turned by an angle that
// grows with the position.
//
// Pair i of the D_rot / 2 rotated ones, angle a = position * inv_freq[i] (a product of two f32):
//   (x, y) -> f (x cos a - y sin a, y cos a + x sin a),   f the attention factor
// style half: elements i and i + D_rot / 2; interleaved: 2i and 2i + 1. Elements from D_rot on are
// copied. `inverse` turns by -a: that is the backward, of dy into dx.
// cos and sin have f32 precision for any angle below 2^30; with x in bf16 they are rounded to bf16
// (as models that compute in bf16 do), the rotation is in f32 and rounded once.
//
// x, y [B, T, H, D], f32 or bf16, a gradient that is written may be the other one. Unit stride
// within a head; any strides between heads and tokens (a slice of a fused product). y may be x.
// positions i64 [B, T] or [T]; inv_freq f32 [D_rot / 2], D_rot <= D. With `accumulate` the result
// is added to what is there.
// Errors: other dtypes, shapes, devices or strides.
// Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace reprise::kernels {

enum class RopeStyle : std::uint8_t { half, interleaved };

struct RopeOptions {
  RopeStyle style = RopeStyle::half;
  double attention_factor = 1;
};

void rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, RopeOptions options,
          const Tensor& y, bool inverse = false, bool accumulate = false);

}  // namespace reprise::kernels
