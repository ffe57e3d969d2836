// Normalisation of rows: rms_norm and layer_norm, each alone or fused with the residual add before
// it.
//
// Rows are the leading dimensions of x taken together: x is [.., C], one statistic a row.
//
//   sum = x + residual               rounded to the dtype of x; without a residual, sum is x
//   rms_norm    scale = 1 / sqrt(mean(sum^2) + epsilon)
//               y = weight * round(sum * scale)          two roundings in bf16, one after each
//               product
//   layer_norm  mean = mean(sum),  scale = 1 / sqrt(mean((sum - mean)^2) + epsilon)
//               y = (sum - mean) * scale * weight + bias                                  one
//               rounding
//
// With n = sum * scale or (sum - mean) * scale, and g = dy * weight, the gradients are
//
//   dx      = scale * (g - n * mean(g * n)) + dsum                            rms_norm
//   dx      = scale * (g - mean(g) - n * mean(g * n)) + dsum                  layer_norm
//   dweight = sum over rows of dy * n  (n rounded where the forward rounds it)
//   dbias   = sum over rows of dy
//
// and the gradient of the residual is dx, so one tensor serves both.
//
// Shapes    x, residual, sum, y and their gradients [.., C]; weight, bias and their gradients [C];
//           mean and scale the leading dimensions of x. Any of them may be empty.
// Types     f32 or bf16, the same for all but: mean and scale are f32; dweight and dbias are f32 or
//           the dtype of x. Arithmetic is in f32.
// Layout    x, residual, sum, y and their gradients: rows of unit stride; the others contiguous.
// Aliasing  sum and y may each be x or residual (not the same one); y may be x; dx may be dy or
//           dsum. Otherwise outputs overlap nothing.
// Results are the same for any number of threads: a gradient of a weight is the sum, in order, of
// those of fixed runs of rows.
// Errors    Error for a shape, dtype, device or layout that is not as above, and a negative
// epsilon.
//
// Source: Ba, Kiros, Hinton, "Layer normalization", 2016; Zhang, Sennrich, "Root mean square layer
// normalization", NeurIPS 2019. Roundings as in the Llama and GPT-2 of the transformers library.
#pragma once

#include "core/tensor.h"

namespace reprise::kernels {

void rms_norm(const Tensor& x, const Tensor& weight, double epsilon, const Tensor& y,
              const Tensor& scale);
void rms_norm_residual(const Tensor& x, const Tensor& residual, const Tensor& weight,
                       double epsilon, const Tensor& y, const Tensor& sum, const Tensor& scale);

// `bias` may be undefined: none.
void layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon,
                const Tensor& y, const Tensor& mean, const Tensor& scale);
void layer_norm_residual(const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const Tensor& bias, double epsilon, const Tensor& y, const Tensor& sum,
                         const Tensor& mean, const Tensor& scale);

// Where a gradient goes: added to what the tensor holds (before the rounding) or written over it.
// With an undefined tensor it is not computed.
struct NormGradient {
  Tensor tensor;
  bool accumulate = false;
};
struct NormGradients {
  NormGradient dx, dweight, dbias;
};

// `x` is what was normalised (the sum, in the residual form); `dsum` its other gradient, or
// undefined. `weight` is read for dx only and x for dx and dweight only: else they may be
// undefined.
void rms_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight,
                       const Tensor& scale, const NormGradients& gradients);
void layer_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& x,
                         const Tensor& weight, const Tensor& mean, const Tensor& scale,
                         const NormGradients& gradients);

}  // namespace reprise::kernels
