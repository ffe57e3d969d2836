// Clipping by the global norm of all gradients.
#pragma once

#include <span>

#include "autograd/parameter.h"

namespace reprise::nn {

// The 2-norm of all gradients together, in f64, added in the order of the parameters and in chunks
// of fixed size: independent of threads. Parameters without a gradient count nothing. (PyTorch
// rounds each tensor's norm to the gradient's dtype first.) On meta nothing is computed: 0. Throws
// Error when a gradient is stale.
double global_norm(std::span<Parameter* const> parameters);

// min(1, max_norm / (norm + 1e-6)); NaN when the norm is. Throws Error unless max_norm > 0.
double clip_coefficient(double norm, double max_norm);

// Multiplies all gradients by the coefficient of their norm. Returns the norm before. (Without the
// extra pass over the gradients: AdamW::step(lr, clip_coefficient(global_norm(p), max_norm)).)
double clip_global_norm(std::span<Parameter* const> parameters, double max_norm);

}  // namespace reprise::nn
