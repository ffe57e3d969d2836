// The sides of rope.h.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace reprise::kernels {

// [B, T, H, D] with unit stride within a head.
struct Heads {
  void* at;
  DType dtype;
  std::int64_t batch_stride, token_stride, head_stride;  // elements
};

inline constexpr int kMaxRopeSections = 8;

// Pairs [end of the section before, end) have the positions of the section. There is one at least.
struct RopeSections {
  int count;
  std::int64_t ends[kMaxRopeSections];
  std::int64_t stride;  // from the positions of a section to those of the next
};

struct RopeCall {
  Heads x, y;
  std::int64_t batch, tokens, heads, size, pairs;  // B, T, H, D, D_rot / 2
  const std::int64_t* positions;
  std::int64_t positions_batch_stride;
  RopeSections sections;
  const float* inv_freq;
  bool interleaved;
  float cos_factor, sin_factor;  // the attention factor; sin's negative turns back
  bool round_to_bf16;            // cos and sin
  bool accumulate;
};

namespace cpu {
void rope(const RopeCall& call);
}
// In order of the stream.
namespace cuda {
void rope(const RopeCall& call, void* stream);
}

}  // namespace reprise::kernels
