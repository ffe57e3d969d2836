// One step of AdamW over many tensors at once.
//
//   g = gradient_scale * gradient
//   p = p * (1 - lr * decay)
//   m = m + (1 - b1) (g - m)
//   v = b2 v + (1 - b2) g^2
//   p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + epsilon)
//
// Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019; order of operations
// and the scalars in double as in PyTorch's torch.optim.AdamW. All in f32, rounded once when stored
// (PyTorch rounds bf16 states after every operation). With a master, p is the master and the value
// is p rounded to its dtype; without, p is the value. Shapes: value, gradient, m, v and master of
// one tensor have one shape, contiguous. Dtypes: value and gradient f32 or bf16, each on its own; m
// and v both f32 or both bf16; master f32 or absent. Aliasing: none. The tensors are cut into
// chunks of fixed size together; every element is computed on its own, so nothing depends on
// threads. Errors: shapes, dtypes, devices or strides other than these, named by the place in the
// list; a step below 1; settings that are not finite, negative, or betas not in [0, 1).
#pragma once

#include <cstdint>
#include <span>

#include "core/tensor.h"

namespace reprise::kernels {

struct AdamWTensor {
  Tensor value, gradient, m, v;
  Tensor master;  // may be undefined
  double decay = 0;
  std::int64_t step = 1;  // t, from 1
};

struct AdamWSettings {
  double learning_rate = 1e-3;
  double beta1 = 0.9, beta2 = 0.999;
  double epsilon = 1e-8;
  double gradient_scale = 1;
};

void adamw(std::span<const AdamWTensor> tensors, const AdamWSettings& settings);

// The same with what changes from step to step in memory: a row of `scalars` for each tensor, f32
// [tensors, kAdamWScalars] on the tensors' device, contiguous, read when the kernel runs. So a
// captured step (core/step_graph.h) takes another learning rate and step count at each launch: the
// scalars are made on the host, copied to the device, and the graph launched. Bitwise the same as
// with the settings themselves.
inline constexpr std::int64_t kAdamWScalars = 8;
// f32 [tensors, kAdamWScalars] in host memory.
Tensor adamw_scalars(std::span<const AdamWTensor> tensors, const AdamWSettings& settings);
void adamw(std::span<const AdamWTensor> tensors, const Tensor& scalars);

// The gradient scale of a step that the host does not look at, into the first column of `scalars`:
//
//   n = sqrt(sum_j squares_j)                              in f64, in order
//   scale = min(1, max_norm / (n + 1e-6)), 1 for max_norm 0
//   outcome = losses, n
//
// When a loss or n is not finite, or the device has found a wrong number (core/device_faults.h),
// the scale is NaN, and a tensor whose gradient scale is NaN is left as it is by adamw(). Shapes:
// squares [tensors] f64, as squared_norms gives them; losses [L] f32; scalars f32 [rows,
// kAdamWScalars]; outcome f64 [L + 1]; contiguous, on one device. Errors: others, and a max_norm
// that is negative or not a number.
void adamw_gradient_scale(const Tensor& squares, const Tensor& losses, double max_norm,
                          const Tensor& scalars, const Tensor& outcome);

}  // namespace reprise::kernels
