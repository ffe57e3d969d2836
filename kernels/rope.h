// Rotary position embedding of [B, T, H, D]: pairs of elements of a head turned by an angle that
// grows with the position.
//
// Pair i of the D_rot / 2 rotated ones, angle a = position * inv_freq[i] (a product of two f32):
//   (x, y) -> f (x cos a - y sin a, y cos a + x sin a),   f the attention factor
// style half: elements i and i + D_rot / 2; interleaved: 2i and 2i + 1. Elements from D_rot on are
// copied. `inverse` turns by -a: that is the backward, of dy into dx.
// cos and sin have f32 precision for any angle below 2^30; with x in bf16 they are rounded to bf16
// (as models that compute in bf16 do) unless `f32_tables`; the rotation is in f32 and rounded once.
//
// With R sections, sizes that add up to D_rot / 2, a token has R positions: pair i is turned by
// that of the section in which i falls. The frequencies are not numbered anew in a section:
// Qwen2-VL's text has sections 16, 24, 24 (time, row, column); its vision tower sections 20, 20
// and a table that holds its 20 frequencies twice.
//
// x, y [B, T, H, D], f32 or bf16, a gradient that is written may be the other one. Unit stride
// within a head; any strides between heads and tokens (a slice of a fused product). y may be x.
// positions i64 [B, T] or [T], with sections [R, B, T] or [R, T]; inv_freq f32 [D_rot / 2], D_rot
// <= D. With `accumulate` the result is added to what is there. Errors: other dtypes, shapes,
// devices or strides; more than 8 sections, or sizes that are negative or add up to something else.
// Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor.h"

namespace reprise::kernels {

enum class RopeStyle : std::uint8_t { half, interleaved };

struct RopeOptions {
  RopeStyle style = RopeStyle::half;
  double attention_factor = 1;
  std::vector<std::int64_t> sections = {};  // none: one position a token
  bool f32_tables = false;
};

void rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq,
          const RopeOptions& options, const Tensor& y, bool inverse = false,
          bool accumulate = false);

}  // namespace reprise::kernels
