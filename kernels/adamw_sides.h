// The sides of adamw.h.
#pragma once

#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace reprise::kernels {

// The scalars of one tensor's step, each computed in double and rounded once.
struct AdamWScalars {
  float gradient_scale;
  float keep;               // 1 - lr * decay
  float beta1_rest;         // 1 - b1
  float beta2, beta2_rest;  // b2, 1 - b2
  float minus_step_size;    // -lr / (1 - b1^t)
  float correction2_root;   // sqrt(1 - b2^t)
  float epsilon;
};

struct AdamWRun {
  void* value;
  const void* gradient;
  void* m;
  void* v;
  float* master;  // may be null
  DType value_dtype, gradient_dtype, state_dtype;
};

namespace cpu {
// Elements [begin, end), on this thread.
void adamw_run(const AdamWRun& run, const AdamWScalars& scalars, std::int64_t begin,
               std::int64_t end);
}  // namespace cpu

struct AdamWItem {
  AdamWRun run;
  AdamWScalars scalars;
  const AdamWScalars* in_memory;  // of the device: what is read instead; may be null
  std::int64_t count;
};
inline constexpr std::int64_t kAdamWChunkElements = 16384;

// In order of the stream, many tensors a launch.
namespace cuda {
void adamw(std::span<const AdamWItem> items, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
