#include "nn/optimizer/clip.h"

#include <cmath>
#include <vector>

#include "core/error.h"
#include "kernels/reduce.h"

namespace reprise::nn {
namespace {

// For writing: Parameter throws for a stale one.
std::vector<Tensor> gradients(std::span<Parameter* const> parameters) {
  std::vector<Tensor> tensors;
  for (Parameter* p : parameters) {
    if (p->has_gradient() || p->stale()) {
      tensors.push_back(p->write_gradient());
    }
  }
  return tensors;
}

double norm_of(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) {
    return 0;
  }
  const Tensor squares = Tensor::empty(Shape{static_cast<std::int64_t>(tensors.size())}, DType::f64,
                                       tensors[0].device(), MemoryKind::workspace);
  kernels::squared_norms(tensors, squares);
  if (squares.is_meta()) {
    return 0;
  }
  double total = 0;
  for (const double square : squares.to_vector<double>()) {
    total += square;
  }
  return std::sqrt(total);
}

}  // namespace

double global_norm(std::span<Parameter* const> parameters) {
  return norm_of(gradients(parameters));
}

double clip_coefficient(double norm, double max_norm) {
  if (!(max_norm > 0)) {
    fail("clip_global_norm", "max_norm must be positive, got {}", max_norm);
  }
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

double clip_global_norm(std::span<Parameter* const> parameters, double max_norm) {
  const std::vector<Tensor> tensors = gradients(parameters);
  const double norm = norm_of(tensors);
  const double coefficient = clip_coefficient(norm, max_norm);
  if (coefficient != 1) {
    kernels::scale_all(tensors, coefficient);
  }
  return norm;
}

}  // namespace reprise::nn
