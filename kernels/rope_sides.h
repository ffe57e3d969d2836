// The CPU side of rope.h.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "kernels/rope.h"

namespace reprise::kernels::cpu {

// [B, T, H, D] with unit stride within a head.
struct Heads {
  void* at;
  DType dtype;
  std::int64_t batch_stride, token_stride, head_stride;  // elements
};

struct RopeCall {
  Heads x, y;
  std::int64_t batch, tokens, heads, size, pairs;  // B, T, H, D, D_rot / 2
  const std::int64_t* positions;
  std::int64_t positions_batch_stride;
  const float* inv_freq;
  RopeStyle style;
  float cos_factor, sin_factor;  // the attention factor; sin's negative turns back
  bool accumulate;
};
void rope(const RopeCall& call);

}  // namespace reprise::kernels::cpu
