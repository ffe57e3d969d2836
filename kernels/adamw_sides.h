// The sides of adamw.h.
#pragma once

#include <cstdint>
#include <span>

#include <math.h>

#include "core/dtype.h"
#include "kernels/both_sides.h"

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

// Of adamw_gradient_scale.
struct AdamWOutcome {
  const double* squares;
  std::int64_t tensors;
  const float* losses;
  std::int64_t loss_count;
  double max_norm;
  AdamWScalars* scalars;
  std::int64_t rows;
  double* outcome;
  const std::int64_t* fault;  // not 0: the device has found a wrong number; may be null
};
// Writes the outcome; the scale, for every row.
REPRISE_BOTH_SIDES inline float adamw_scale_of(const AdamWOutcome& of) {
  double total = 0;
  for (std::int64_t j = 0; j < of.tensors; ++j) {
    total += of.squares[j];
  }
  const double norm = sqrt(total);
  bool finite = isfinite(norm);
  for (std::int64_t i = 0; i < of.loss_count; ++i) {
    finite = finite && isfinite(of.losses[i]);
    of.outcome[i] = static_cast<double>(of.losses[i]);
  }
  of.outcome[of.loss_count] = norm;
  if (!finite || (of.fault != nullptr && *of.fault != 0)) {
    return NAN;
  }
  const double scale = of.max_norm > 0 ? of.max_norm / (norm + 1e-6) : 1.0;
  return static_cast<float>(scale > 1 ? 1.0 : scale);
}

// In order of the stream, many tensors a launch.
namespace cuda {
void adamw(std::span<const AdamWItem> items, void* stream);
void adamw_gradient_scale(const AdamWOutcome& of, void* stream);
}  // namespace cuda

}  // namespace reprise::kernels
